//! A small server for the tests: Open Inference Protocol v2 over HTTP/1.1 by hand, the model run by ONNX Runtime. It
//! counts the queries it sees and can misbehave on purpose.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use metazoa::access::session::{Session, Tensor, Values};
use serde_json::{Value, json};

use crate::support::runtime;

/// What the server does to the next requests for an answer, one entry each; then it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Answers with this status.
    Status(u16),
    /// Reads the request and closes the connection.
    Cut,
    /// Closes the connection in the middle of a good answer.
    HalfAnswer,
    /// Takes this long.
    Slow(Duration),
    /// Refuses with this status and repeats the token it was sent.
    Echo(u16),
    /// Sends the client to the same path of another server.
    Redirect(std::net::SocketAddr),
    /// Answers well-formed HTTP that is no answer of the protocol.
    Nonsense,
}

/// How tensors travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Data {
    Json,
    Binary,
}

struct State {
    session: Mutex<Session>,
    name: String,
    data: Data,
    faults: Mutex<Vec<Fault>>,
    queries: AtomicU64,
    requests: AtomicU64,
    /// Closes the listener and every connection once this many queries were seen.
    dies_after: AtomicU64,
    dead: AtomicBool,
    connections: Mutex<Vec<TcpStream>>,
    authorizations: Mutex<Vec<String>>,
}

/// A running server; it stops when dropped.
pub(crate) struct Server {
    state: Arc<State>,
    address: std::net::SocketAddr,
}

impl Server {
    /// Serves `model` as `name` on a free port.
    pub(crate) fn start(model: &Path, name: &str, data: Data) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            session: Mutex::new(runtime().open(model).unwrap()),
            name: name.to_owned(),
            data,
            faults: Mutex::default(),
            queries: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            dies_after: AtomicU64::new(u64::MAX),
            dead: AtomicBool::new(false),
            connections: Mutex::default(),
            authorizations: Mutex::default(),
        });
        let own = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if own.dead.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                own.connections.lock().unwrap().push(stream.try_clone().unwrap());
                let state = Arc::clone(&own);
                std::thread::spawn(move || {
                    // A connection that breaks is the client's affair.
                    let _ = state.serve(stream);
                });
            }
        });
        Self { state, address }
    }

    pub(crate) fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Images in all requests for an answer that arrived whole.
    pub(crate) fn queries(&self) -> u64 {
        self.state.queries.load(Ordering::SeqCst)
    }

    /// Requests for an answer that arrived whole.
    pub(crate) fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn authorizations(&self) -> Vec<String> {
        self.state.authorizations.lock().unwrap().clone()
    }

    /// What happens to the next requests.
    pub(crate) fn faults(&self, faults: &[Fault]) {
        *self.state.faults.lock().unwrap() = faults.to_vec();
    }

    /// The server is killed once it has seen `queries`.
    pub(crate) fn die_after(&self, queries: u64) {
        self.state.dies_after.store(queries, Ordering::SeqCst);
    }

    /// Kills it.
    pub(crate) fn kill(&self) {
        self.state.kill(self.address);
    }

    /// A sidecar for it.
    pub(crate) fn sidecar(&self, more: &str) -> String {
        let end = format!("endpoint: {{url: '{}', model_name: '{}'}}", self.url(), self.state.name);
        format!("schema_version: 1\n{end}\n{more}")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Request {
    method: String,
    path: String,
    json_length: Option<usize>,
    authorization: Option<String>,
    body: Vec<u8>,
}

impl State {
    fn kill(&self, address: std::net::SocketAddr) {
        if !self.dead.swap(true, Ordering::SeqCst) {
            for connection in self.connections.lock().unwrap().drain(..) {
                let _ = connection.shutdown(Shutdown::Both);
            }
            // Wakes the listener, which then closes.
            let _ = TcpStream::connect(address);
        }
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let address = stream.local_addr()?;
        let mut writer = stream.try_clone()?;
        let mut reader = BufReader::new(stream);
        while let Some(request) = read_request(&mut reader)? {
            if let Some(value) = &request.authorization {
                self.authorizations.lock().unwrap().push(value.clone());
            }
            if request.method == "GET" {
                let (status, json) = self.describe(&request.path);
                write_answer(&mut writer, status, None, json.to_string().as_bytes())?;
                continue;
            }
            if request.path != format!("/v2/models/{}/infer", self.name) {
                write_answer(&mut writer, 404, None, br#"{"error":"no such model"}"#)?;
                continue;
            }
            let input = read_input(&request);
            self.requests.fetch_add(1, Ordering::SeqCst);
            let count = input.shape[0] as u64;
            let seen = self.queries.fetch_add(count, Ordering::SeqCst) + count;
            if seen >= self.dies_after.load(Ordering::SeqCst) {
                self.kill(address);
                return Ok(());
            }
            let fault = {
                let mut faults = self.faults.lock().unwrap();
                (!faults.is_empty()).then(|| faults.remove(0))
            };
            match fault {
                Some(Fault::Status(status)) => {
                    write_answer(&mut writer, status, None, br#"{"error":"on purpose"}"#)?;
                    continue;
                }
                Some(Fault::Echo(status)) => {
                    let token = request.authorization.as_deref().unwrap_or_default();
                    let text = json!({"error": format!("unknown token {token}")}).to_string();
                    write_answer(&mut writer, status, None, text.as_bytes())?;
                    continue;
                }
                Some(Fault::Redirect(to)) => {
                    let to = format!("http://{to}{}", request.path);
                    let head = "HTTP/1.1 307 X\r\nContent-Length: 0\r\nLocation:";
                    writer.write_all(format!("{head} {to}\r\n\r\n").as_bytes())?;
                    continue;
                }
                Some(Fault::Cut) => {
                    let _ = writer.shutdown(Shutdown::Both);
                    return Ok(());
                }
                Some(Fault::Nonsense) => {
                    write_answer(&mut writer, 200, None, b"<html>welcome</html>")?;
                    continue;
                }
                Some(Fault::Slow(time)) => std::thread::sleep(time),
                Some(Fault::HalfAnswer) | None => {}
            }
            let (head, bytes) = self.answer(input);
            let body = [head.as_bytes(), &bytes].concat();
            let length = (self.data == Data::Binary).then_some(head.len());
            if fault == Some(Fault::HalfAnswer) {
                let start = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
                writer.write_all(start.as_bytes())?;
                writer.write_all(&body[..body.len() / 2])?;
                let _ = writer.shutdown(Shutdown::Both);
                return Ok(());
            }
            write_answer(&mut writer, 200, length, &body)?;
        }
        Ok(())
    }

    fn describe(&self, path: &str) -> (u16, Value) {
        if path == "/v2" {
            let extensions = match self.data {
                Data::Json => json!([]),
                Data::Binary => json!(["classification", "binary_tensor_data"]),
            };
            return (200, json!({"name": "test", "version": "1", "extensions": extensions}));
        }
        if path != format!("/v2/models/{}", self.name) {
            return (404, json!({"error": "no such model"}));
        }
        let session = self.session.lock().unwrap();
        let tensors = |ports: &[metazoa::access::session::Port]| -> Vec<Value> {
            let tensor = |port: &metazoa::access::session::Port| {
                let shape: Vec<i64> =
                    port.dims.iter().map(|dim| dim.map_or(-1, |dim| dim as i64)).collect();
                let datatype = match port.element.as_str() {
                    "f32" => "FP32",
                    "f16" => "FP16",
                    "u8" => "UINT8",
                    "i64" => "INT64",
                    other => panic!("{other}"),
                };
                json!({"name": port.name, "datatype": datatype, "shape": shape})
            };
            ports.iter().map(tensor).collect()
        };
        let (inputs, outputs) = (tensors(session.inputs()), tensors(session.outputs()));
        let platform = "onnxruntime_onnx";
        (
            200,
            json!({"name": self.name, "platform": platform, "inputs": inputs, "outputs": outputs}),
        )
    }

    /// All outputs of the model: JSON, and the bytes behind it.
    fn answer(&self, input: Tensor) -> (String, Vec<u8>) {
        let mut session = self.session.lock().unwrap();
        let name = session.inputs()[0].name.clone();
        let names: Vec<String> = session.outputs().iter().map(|port| port.name.clone()).collect();
        let asked: Vec<&str> = names.iter().map(String::as_str).collect();
        let results = session.run(vec![(&name, input)], &asked).unwrap();
        let mut bytes = Vec::new();
        let outputs: Vec<Value> = names
            .iter()
            .zip(results)
            .map(|(name, tensor)| {
                let (datatype, raw, numbers) = match &tensor.values {
                    Values::I64(v) => {
                        let raw: Vec<u8> = v.iter().flat_map(|v| v.to_le_bytes()).collect();
                        ("INT64", raw, json!(v))
                    }
                    other => {
                        let v = other.to_f32();
                        ("FP32", v.iter().flat_map(|v| v.to_le_bytes()).collect(), json!(v))
                    }
                };
                let mut one = json!({"name": name, "datatype": datatype, "shape": tensor.shape});
                match self.data {
                    Data::Json => one["data"] = numbers,
                    Data::Binary => {
                        one["parameters"] = json!({"binary_data_size": raw.len()});
                        bytes.extend(raw);
                    }
                }
                one
            })
            .collect();
        (json!({"model_name": self.name, "outputs": outputs}).to_string(), bytes)
    }
}

fn read_request(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut request = Request {
        method: method.to_owned(),
        path: path.to_owned(),
        json_length: None,
        authorization: None,
        body: Vec::new(),
    };
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap(),
            "inference-header-content-length" => request.json_length = value.parse().ok(),
            "authorization" => request.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    request.body = vec![0; length];
    reader.read_exact(&mut request.body)?;
    Ok(Some(request))
}

fn read_input(request: &Request) -> Tensor {
    let head = request.json_length.unwrap_or(request.body.len());
    let (json, bytes) = request.body.split_at(head);
    let json: Value = serde_json::from_slice(json).unwrap();
    let input = &json["inputs"][0];
    let shape = input["shape"].as_array().unwrap();
    let shape: Vec<usize> = shape.iter().map(|size| size.as_u64().unwrap() as usize).collect();
    let numbers = || input["data"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap());
    let binary = request.json_length.is_some();
    let values = match input["datatype"].as_str().unwrap() {
        "FP32" if binary => Values::F32(
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        ),
        "FP32" => Values::F32(numbers().map(|v| v as f32).collect()),
        "UINT8" if binary => Values::U8(bytes.to_vec()),
        "UINT8" => Values::U8(numbers().map(|v| v as u8).collect()),
        other => panic!("{other}"),
    };
    Tensor { shape, values }
}

fn write_answer(
    writer: &mut TcpStream,
    status: u16,
    json_length: Option<usize>,
    body: &[u8],
) -> std::io::Result<()> {
    let extra = json_length
        .map(|length| format!("Inference-Header-Content-Length: {length}\r\n"))
        .unwrap_or_default();
    let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{extra}\r\n", body.len());
    writer.write_all(head.as_bytes())?;
    writer.write_all(body)
}
