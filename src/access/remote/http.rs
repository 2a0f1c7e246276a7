//! One server over HTTP: timeouts, retries, the token. Knows nothing of what is sent.
//!
//! Sent again after a wait that doubles: answers 5xx, connections that broke, requests that timed out. Never sent
//! again: answers 4xx (they would be the same) and redirects. The token is in the header of a request and nowhere
//! else: not in a message, a log line or a `Debug` form.

use std::fmt;
use std::time::Duration;

use ureq::http::Response;

use super::protocol::Body;
use crate::error::{Error, Result};

/// Header that says where the JSON of a body ends (the protocol's binary extension).
const JSON_LENGTH: &str = "Inference-Header-Content-Length";

/// Longest time a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);

/// Most bytes read of an error's text.
const ERROR_BYTES: u64 = 4096;

/// Value of an `Authorization` header.
#[derive(Clone)]
pub struct Authorization(String);

impl Authorization {
    /// From what the user's variable holds: `Bearer TOKEN` (or another scheme) as it is, a bare token with
    /// `Bearer` before it.
    ///
    /// # Errors
    /// When it holds nothing, or what no header can carry; the message does not repeat it.
    pub fn new(text: &str) -> Result<Self> {
        let text = text.trim();
        if text.is_empty() || !text.chars().all(|c| c == ' ' || c.is_ascii_graphic()) {
            return Err(Error::input("the token is empty or holds what a header cannot carry"));
        }
        let value = if text.contains(' ') { text.to_owned() } else { format!("Bearer {text}") };
        Ok(Self(value))
    }

    /// `text` without the token, should a server have put it there.
    fn taken_out_of(&self, text: &str) -> String {
        let token = self.0.split_once(' ').map_or(self.0.as_str(), |(_, token)| token.trim());
        text.replace(token, "[token]")
    }
}

impl fmt::Debug for Authorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authorization(..)")
    }
}

/// How often a request is sent, and how long is waited between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries {
    /// Times a request is sent at most.
    pub attempts: u32,
    /// Wait before the second time; it doubles each time.
    pub first_wait: Duration,
}

impl Retries {
    /// For queries: six times within eight seconds, long enough for a server that restarts.
    pub const QUERY: Self = Self { attempts: 6, first_wait: Duration::from_millis(250) };
    /// For first contact, where a server that is not there must not hold up a zoo.
    pub const CONTACT: Self = Self { attempts: 3, first_wait: Duration::from_millis(250) };
}

/// Told of each time a request is sent.
pub(super) trait Account {
    /// It is about to be sent.
    ///
    /// # Errors
    /// When it may not be.
    fn send(&self) -> Result<()>;
    /// It never left this machine.
    ///
    /// # Errors
    /// When that cannot be written down.
    fn unsent(&self) -> Result<()>;
}

/// For requests that are not counted.
pub(super) struct Free;

impl Account for Free {
    fn send(&self) -> Result<()> {
        Ok(())
    }

    fn unsent(&self) -> Result<()> {
        Ok(())
    }
}

/// A server.
#[derive(Debug)]
pub(super) struct Client {
    agent: ureq::Agent,
    base: String,
    authorization: Option<Authorization>,
    retries: Retries,
}

/// Why one sending failed.
struct Failure {
    text: String,
    /// The status, when the server answered.
    status: Option<u16>,
    /// The server cannot have seen the request.
    unsent: bool,
    /// Sending it again may help.
    passing: bool,
}

impl Client {
    pub(super) fn new(
        base: &str,
        timeout: Duration,
        authorization: Option<Authorization>,
        retries: Retries,
    ) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(timeout))
            .timeout_connect(Some(timeout.min(CONNECT)))
            .http_status_as_error(false)
            // A redirected token could reach another host; a redirected query would be counted wrong.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("metazoa/", env!("CARGO_PKG_VERSION")))
            .build();
        let base = base.trim_end_matches('/').to_owned();
        Self { agent: config.into(), base, authorization, retries }
    }

    /// Gets `path` (from `/`), at most `limit` bytes.
    ///
    /// # Errors
    /// When no good answer comes.
    pub(super) fn get(&self, path: &str, limit: u64) -> Result<Body> {
        self.repeat(path, &Free, || {
            let mut request = self.agent.get(format!("{}{path}", self.base));
            if let Some(Authorization(value)) = &self.authorization {
                request = request.header("Authorization", value);
            }
            read(request.call(), limit, self.authorization.as_ref())
        })
    }

    /// Posts `body` to `path` and reads at most `limit` bytes; `account` is told of every time it is sent.
    ///
    /// # Errors
    /// When no good answer comes; those of `account`.
    pub(super) fn post(
        &self,
        path: &str,
        body: &Body,
        limit: u64,
        account: &dyn Account,
    ) -> Result<Body> {
        self.repeat(path, account, || {
            let mut request = self.agent.post(format!("{}{path}", self.base));
            if let Some(Authorization(value)) = &self.authorization {
                request = request.header("Authorization", value);
            }
            request = match body.json_length {
                Some(length) => request
                    .header(JSON_LENGTH, length.to_string())
                    .content_type("application/octet-stream"),
                None => request.content_type("application/json"),
            };
            read(request.send(body.bytes.as_slice()), limit, self.authorization.as_ref())
        })
    }

    fn repeat(
        &self,
        path: &str,
        account: &dyn Account,
        once: impl Fn() -> Result<Body, Failure>,
    ) -> Result<Body> {
        let mut wait = self.retries.first_wait;
        let mut attempt = 1;
        loop {
            account.send()?;
            let failure = match once() {
                Ok(body) => return Ok(body),
                Err(failure) => failure,
            };
            if failure.unsent {
                account.unsent()?;
            }
            if !failure.passing || attempt >= self.retries.attempts {
                return Err(self.error(path, attempt, &failure));
            }
            tracing::info!("{}{path}: {}, again in {wait:?}", self.base, failure.text);
            std::thread::sleep(wait);
            wait = wait.saturating_mul(2);
            attempt += 1;
        }
    }

    fn error(&self, path: &str, attempts: u32, failure: &Failure) -> Error {
        let times = if attempts == 1 { String::new() } else { format!(" {attempts} times") };
        let error = Error::input(format!("{}{times} from `{}{path}`", failure.text, self.base));
        error.hint(match failure.status {
            Some(401 | 403) => "put a valid token into the variable that the sidecar's `endpoint.header_env` names",
            Some(404) => "check `endpoint.model_name`, `model_version` and `url` in the sidecar, and that the model is loaded",
            Some(413) => "set `max_batch_size` in the sidecar to what the server takes",
            Some(_) => "look into the server's log",
            None if failure.unsent => "start the server, or correct `endpoint.url` in the sidecar",
            None => "look into the server's log; a slow server needs a longer `endpoint.timeout_s` or a smaller `max_batch_size`",
        })
    }
}

fn read(
    answer: Result<Response<ureq::Body>, ureq::Error>,
    limit: u64,
    authorization: Option<&Authorization>,
) -> Result<Body, Failure> {
    let mut answer = answer.map_err(|error| broken(&error))?;
    let status = answer.status().as_u16();
    if status != 200 {
        let text = answer.body_mut().with_config().limit(ERROR_BYTES).read_to_vec();
        let text = String::from_utf8_lossy(&text.unwrap_or_default()).into_owned();
        return Err(Failure {
            text: format!("status {status}{}", said(&text, authorization)),
            status: Some(status),
            unsent: false,
            passing: status >= 500,
        });
    }
    let length = answer.headers().get(JSON_LENGTH).and_then(|value| value.to_str().ok());
    let json_length = length.and_then(|length| length.trim().parse().ok());
    match answer.body_mut().with_config().limit(limit).read_to_vec() {
        Ok(bytes) => Ok(Body { bytes, json_length }),
        Err(ureq::Error::BodyExceedsLimit(_)) => Err(Failure {
            text: format!("an answer longer than `{limit}` bytes"),
            status: None,
            unsent: false,
            passing: false,
        }),
        Err(error) => Err(broken(&error)),
    }
}

/// The reason a server gives, made fit for one line; a token that it repeats is taken out.
fn said(text: &str, authorization: Option<&Authorization>) -> String {
    let json: Option<serde_json::Value> = serde_json::from_str(text).ok();
    let reason = json.as_ref().and_then(|json| json["error"].as_str()).unwrap_or(text);
    let reason: String = reason.chars().filter(|c| !c.is_control()).collect();
    let reason = authorization.map_or(reason.clone(), |token| token.taken_out_of(&reason));
    let reason: String = reason.chars().take(200).collect();
    if reason.trim().is_empty() { String::new() } else { format!(" ({})", reason.trim()) }
}

/// A failure without an answer. Only what certainly happens before the first byte counts as unsent.
fn broken(error: &ureq::Error) -> Failure {
    use std::io::ErrorKind as Io;
    use ureq::{Error as E, Timeout};
    let before = match error {
        E::HostNotFound | E::BadUri(_) | E::InvalidProxyUrl | E::ConnectProxyFailed(_) => true,
        E::ConnectionFailed | E::TlsRequired | E::Http(_) => true,
        E::Timeout(Timeout::Resolve | Timeout::Connect) => true,
        E::Io(io) => matches!(
            io.kind(),
            Io::ConnectionRefused
                | Io::HostUnreachable
                | Io::NetworkUnreachable
                | Io::AddrNotAvailable
        ),
        _ => false,
    };
    let passing = matches!(error, E::Io(_) | E::Timeout(_) | E::ConnectionFailed | E::Protocol(_));
    let text = match error {
        E::Timeout(_) => "no answer in time".to_owned(),
        E::Io(io) => match io.kind() {
            Io::ConnectionRefused => "connection refused".to_owned(),
            _ => format!("connection broken ({io})"),
        },
        E::HostNotFound => "host not found".to_owned(),
        other => format!("no answer ({other})"),
    };
    Failure { text, status: None, unsent: before, passing }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_gets_its_scheme_and_never_shows() {
        assert_eq!(Authorization::new(" abc\n").unwrap().0, "Bearer abc");
        assert_eq!(Authorization::new("Basic abc").unwrap().0, "Basic abc");
        for bad in ["", "  ", "a\u{7f}b", "a\r\nX: y"] {
            assert!(Authorization::new(bad).is_err());
        }
        let client = Client::new(
            "http://h",
            CONNECT,
            Some(Authorization::new("hush-hush").unwrap()),
            Retries::QUERY,
        );
        assert!(!format!("{client:?}").contains("hush"));
    }

    #[test]
    fn a_servers_reason_becomes_one_short_line() {
        assert_eq!(said(r#"{"error":"no\nsuch model"}"#, None), " (nosuch model)");
        assert_eq!(said(&"x".repeat(1000), None).len(), 203);
        assert_eq!(said(" \n", None), "");
    }

    /// Neither whole, nor hidden by a line break, nor cut off in its middle.
    #[test]
    fn a_server_that_repeats_the_token_is_not_quoted_with_it() {
        let token = Authorization::new("hush-hush").unwrap();
        for text in [
            r#"{"error":"unknown: Bearer hush-hush"}"#.to_owned(),
            "hush\n-hush".to_owned(),
            format!("{}hush-hush", "x".repeat(195)),
        ] {
            let shown = said(&text, Some(&token));
            assert!(!shown.contains("hush") && shown.contains("[tok"), "{shown}");
        }
    }
}
