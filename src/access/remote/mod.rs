//! A black-box model behind an address: Open Inference Protocol v2 over HTTP.
//!
//! What counts as a query: every image of every request that may have reached the server. A request that is sent
//! again counts again, since the server may have answered the first one; one whose connection was refused never
//! left and does not count. The filling of a fixed batch travels, so it counts too.

mod http;
mod protocol;

use std::time::Duration;

use serde_json::Value;

pub use http::{Authorization, Retries};

use self::http::{Account, Client};
use self::protocol::Encoding;
use super::black::Backend;
use super::budget::Reservation;
use super::session::Tensor;
use crate::error::{Error, Result};
use crate::zoo::remote::ServedModel;
use crate::zoo::sidecar::Endpoint;
use crate::zoo::{ModelSpec, Preprocess};

/// Seconds a request may take where the sidecar gives none.
const TIMEOUT_S: f64 = 30.0;
/// Most bytes of a description.
const DESCRIPTION_BYTES: u64 = 1 << 20;
/// Bytes that an answer may need a value (JSON digits, spaces), and beside them.
const VALUE_BYTES: u64 = 64;

/// Asks the server what the model of `endpoint` (named there `name`) is. Spends no query.
///
/// # Errors
/// When the server cannot be reached or does not serve such a model.
pub fn describe(
    endpoint: &Endpoint,
    name: &str,
    authorization: Option<Authorization>,
) -> Result<ServedModel> {
    let client = client(endpoint, authorization, Retries::CONTACT);
    protocol::served_model(&json(&client, &model_path(endpoint, name))?)
}

fn client(endpoint: &Endpoint, authorization: Option<Authorization>, retries: Retries) -> Client {
    let timeout = Duration::from_secs_f64(endpoint.timeout_s.unwrap_or(TIMEOUT_S));
    Client::new(&endpoint.url, timeout, authorization, retries)
}

fn json(client: &Client, path: &str) -> Result<Value> {
    let body = client.get(path, DESCRIPTION_BYTES)?;
    serde_json::from_slice(&body.bytes).map_err(|error| {
        Error::input(format!("the server's description at `{path}` is no JSON: `{error}`"))
            .hint("`endpoint.url` must be the base address of a server that speaks the protocol v2")
    })
}

/// `/v2/models/NAME[/versions/VERSION]`.
fn model_path(endpoint: &Endpoint, name: &str) -> String {
    let version = endpoint.model_version.as_deref();
    let version = version.map(|version| format!("/versions/{}", escaped(version)));
    format!("/v2/models/{}{}", escaped(name), version.unwrap_or_default())
}

/// A path segment with what is no plain letter or digit as `%XX`.
fn escaped(text: &str) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-._~".contains(b);
    let one = |b: u8| if plain(&b) { char::from(b).to_string() } else { format!("%{b:02X}") };
    text.bytes().map(one).collect()
}

/// A served model.
#[derive(Debug)]
pub(super) struct RemoteModel {
    client: Client,
    path: String,
    encoding: Encoding,
    input: String,
    output: String,
    rank: usize,
    values_per_image: usize,
}

impl RemoteModel {
    /// Reaches the model of `spec` and checks that it still is what `spec` says.
    ///
    /// # Errors
    /// When the server cannot be reached, or its model has other tensors than `spec`.
    pub(super) fn open(spec: &ModelSpec, authorization: Option<Authorization>) -> Result<Self> {
        let endpoint = spec.endpoint.as_ref();
        let endpoint = endpoint
            .ok_or_else(|| Error::internal(format!("no endpoint for model `{}`", spec.id)))?;
        let name = endpoint.model_name.as_deref().unwrap_or(&spec.id);
        let client = client(endpoint, authorization, Retries::QUERY);
        let path = model_path(endpoint, name);
        let served = protocol::served_model(&json(&client, &path)?)?;
        let input = served.inputs.iter().find(|input| input.name == spec.input_name);
        let output = served.outputs.iter().find(|output| output.name == spec.logits_output);
        let (Some(input), Some(_)) = (input, output) else {
            return Err(Error::input(format!(
                "the served model has changed: no input `{}` with output `{}`",
                spec.input_name, spec.logits_output
            ))
            .hint("ingest the zoo again"));
        };
        // Servers that do not list their extensions are asked in the words that all understand.
        let listed = json(&client, "/v2").unwrap_or_default();
        let listed = listed["extensions"].as_array().map(Vec::as_slice).unwrap_or_default();
        let binary = listed.iter().any(|extension| extension == "binary_tensor_data");
        Ok(Self {
            path: format!("{path}/infer"),
            client,
            encoding: if binary { Encoding::Binary } else { Encoding::Json },
            input: spec.input_name.clone(),
            output: spec.logits_output.clone(),
            rank: input.shape.len(),
            values_per_image: spec.classes + input_values(&spec.preprocess),
        })
    }
}

/// Values of an image; bounds what a server may echo.
fn input_values(preprocess: &Preprocess) -> usize {
    preprocess.input_size.iter().product()
}

impl Backend for RemoteModel {
    fn rank(&self) -> usize {
        self.rank
    }

    fn cost(&self, _asked: usize, filled: usize) -> u64 {
        filled as u64
    }

    fn run(&self, input: Tensor, cost: u64, paid: &Reservation<'_>) -> Result<Tensor> {
        let images = input.shape.first().copied().unwrap_or(0) as u64;
        let limit = (1 << 20) + images * self.values_per_image as u64 * VALUE_BYTES;
        let body = protocol::request(&self.input, &input, &self.output, self.encoding)?;
        let account = Counted { paid, cost };
        let answer = self.client.post(&self.path, &body, limit, &account)?;
        protocol::answer(&answer, &self.output)
    }
}

/// A request whose images count.
struct Counted<'a> {
    paid: &'a Reservation<'a>,
    cost: u64,
}

impl Account for Counted<'_> {
    fn send(&self) -> Result<()> {
        self.paid.take(self.cost)
    }

    fn unsent(&self) -> Result<()> {
        self.paid.give_back(self.cost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_safe_path_segments() {
        let endpoint = Endpoint {
            protocol: None,
            url: "http://h/".into(),
            model_name: None,
            model_version: Some("1/2".into()),
            timeout_s: None,
            header_env: None,
        };
        assert_eq!(model_path(&endpoint, "a b/é"), "/v2/models/a%20b%2F%C3%A9/versions/1%2F2");
    }
}
