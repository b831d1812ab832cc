//! Requests that gave nothing: what may pass, and what to tell the user.

use std::time::Duration;

use ureq::http::{HeaderMap, StatusCode};

use super::client::header;
use super::{RepoSpec, Settings};
use crate::error::Error;

/// A request that gave nothing.
pub(super) enum Failure {
    /// No answer, or one that broke off: why.
    Unreachable(String),
    /// The hub said no.
    Refused(Refusal),
    /// Not the hub's fault, and trying again would not help.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// What the hub said instead of what was asked for.
pub(super) struct Refusal {
    status: StatusCode,
    /// `X-Error-Code`: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo.
    code: String,
    /// Whether the token is none that the hub knows.
    bad_token: bool,
    pub retry_after: Option<Duration>,
}

impl Refusal {
    pub fn read(status: StatusCode, headers: &HeaderMap) -> Self {
        let retry_after = header(headers, "retry-after").and_then(|text| text.trim().parse().ok());
        Self {
            status,
            code: header(headers, "x-error-code").unwrap_or_default(),
            bad_token: header(headers, "x-error-message")
                .is_some_and(|text| text.contains("Invalid credentials")),
            retry_after: retry_after.map(Duration::from_secs),
        }
    }

    /// Whether it says so in the words of a hub.
    pub fn is_a_hubs(&self) -> bool {
        !self.code.is_empty()
    }

    fn may_pass(&self) -> bool {
        matches!(self.status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
    }
}

impl Failure {
    /// Whether it is the hub that is down rather than the request that is wrong.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable(_) => true,
            Self::Refused(refusal) => refusal.may_pass(),
            Self::Final(_) => false,
        }
    }

    /// A failure in words. `file` is what was asked for in the repository, if not the repository itself.
    pub fn explain(self, settings: &Settings, repo: &RepoSpec, file: Option<&str>) -> Error {
        let endpoint = &settings.endpoint;
        let (noun, id, page) = (repo.kind.noun(), &repo.id, repo.page(endpoint));
        let place = file.map_or_else(|| page.clone(), |file| format!("{page}, file {file}"));
        let wanted = match file {
            None => format!("an answer about the {noun} {id}, which is no path on this machine"),
            Some(_) => "the file".to_owned(),
        };
        let refusal = match self {
            Self::Final(error) => return error,
            Self::Unreachable(cause) => {
                return Error::new("the hub cannot be reached").at(place).expected(wanted).found(cause).hint(
                    format!(
                        "on a machine without internet, run `gradlens fetch` with the same flags elsewhere and copy \
                         the cache (HF_HOME); HF_ENDPOINT names another hub than {endpoint}"
                    ),
                );
            }
            Self::Refused(refusal) => refusal,
        };
        let status = refusal.status;
        let found =
            if refusal.code.is_empty() { status.to_string() } else { format!("{status}, {}", refusal.code) };
        let token = settings.token.as_ref();
        let login = match token {
            None => {
                "set HF_TOKEN to a token of an account that may see it (or run `hf auth login`)".to_owned()
            }
            Some(token) => format!("the token of {} is not allowed to see it: use another one", token.origin),
        };
        let error = |what: String| Error::new(what).at(&place).found(&found);
        match (status.as_u16(), refusal.code.as_str()) {
            (401 | 403, "GatedRepo") => {
                error(format!("the {noun} {id} is gated: its licence must be accepted first"))
                    .expected("an account that was granted access")
                    .hint(format!(
                        "accept the licence at {page}, then {}",
                        match token {
                            None =>
                                "set HF_TOKEN to a token of that account (or run `hf auth login`)".to_owned(),
                            Some(token) =>
                                format!("make sure that the token of {} is of that account", token.origin),
                        }
                    ))
            }
            (404, "RevisionNotFound") => error(format!("the {noun} {id} has no such revision"))
                .expected("a branch, a tag or a full commit hash")
                .found(format!("{:?} ({status})", repo.revision))
                .hint(format!("see {page}/commits/main")),
            (404, "EntryNotFound") => error(format!("the {noun} {id} has no such file")),
            (401, _) if refusal.bad_token => error("the hub does not know the token".into())
                .expected("a token that is valid, or none")
                .found(format!("that of {}", token.map_or("the environment", |token| &token.origin)))
                .hint(
                    "make a new one at {endpoint}/settings/tokens, or unset it: public files need none"
                        .replace("{endpoint}", endpoint),
                ),
            // Without a good token the hub does not tell what is missing from what is private.
            (401, "RepoNotFound" | "") | (404, _) => {
                error(format!("the {noun} {id} was not found on the hub"))
                    .expected(format!("the id of a {noun} on {endpoint}, or a path on this machine"))
                    .hint(format!("check the spelling; if it is private, {login}"))
            }
            (401 | 403, _) => {
                error(format!("the hub does not give out the {noun} {id}")).expected("permission").hint(login)
            }
            (429, _) => error("the hub has had too many requests".into())
                .expected("an answer")
                .hint("wait a few minutes; with HF_TOKEN set, more requests are allowed"),
            _ => error("the hub failed to answer".into())
                .expected("an answer")
                .hint("try again later; what is downloaded already is kept"),
        }
    }
}
