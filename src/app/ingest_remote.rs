//! First contact with served models during ingest: what does the server say they are?
//!
//! Only the server's description is read; no query is spent. A server that cannot be reached rejects its own
//! models only.

use super::context::Secrets;
use crate::access::remote;
use crate::error::{Result, ResultExt as _};
use crate::zoo::catalog::CatalogModel;
use crate::zoo::remote::{RemoteCandidate, describe};
use crate::zoo::{Rejection, read};

/// Asks the server of `candidate` and merges its answer with the sidecar.
///
/// # Errors
/// When the token is missing, the server cannot be reached, or what it serves cannot be used.
pub fn look(candidate: &RemoteCandidate, secrets: &Secrets) -> Result<CatalogModel> {
    let endpoint = candidate.endpoint()?;
    let name = endpoint.served_name(&candidate.sidecar.content, &candidate.id);
    let served = remote::describe(endpoint, &name, secrets.authorization(endpoint)?)?;
    describe(candidate, &served)
}

/// As [`look`], with a failure as the rejection of the sidecar.
///
/// # Errors
/// The rejection: path, reason, hint.
pub fn read_remote(
    candidate: &RemoteCandidate,
    secrets: &Secrets,
) -> Result<CatalogModel, Rejection> {
    look(candidate, secrets)
        .context(|| "served model".into())
        .map_err(|error| read::rejection(&candidate.file.relative, &error))
}
