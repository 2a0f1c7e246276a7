"""A model for MLServer that runs one ONNX file by onnxruntime and counts the images it was asked.

tests/it/remote.rs starts it when TEST_MLSERVER names an `mlserver` program whose Python has onnxruntime.
"""
import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    async def load(self) -> bool:
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri)
        self.count = 0
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feed = {one.name: NumpyCodec.decode_input(one) for one in payload.inputs}
        self.count += sum(len(values) for values in feed.values())
        with open("queries.txt", "w") as file:
            file.write(str(self.count))
        names = [one.name for one in self.session.get_outputs()]
        values = self.session.run(names, feed)
        outputs = [NumpyCodec.encode_output(name, value) for name, value in zip(names, values)]
        return InferenceResponse(model_name=self.name, outputs=outputs)
