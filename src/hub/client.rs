//! Requests: what is asked, who gets the token, what is tried again, and what a refusal means.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::{RepoSpec, Settings};
use crate::error::{Context, Error, Result};
use crate::interrupt::Interrupt;

/// Attempts at a request that fails for a reason that may pass.
const TRIES: u32 = 5;
/// Attempts at reaching a hub that does not answer at all: there may be no network, and a cache to go on with.
const TRIES_TO_REACH: u32 = 2;
/// Wait before the second attempt; doubled before each further one.
const FIRST_WAIT: Duration = Duration::from_millis(300);
/// Longest wait that a `Retry-After` is obeyed for.
const LONGEST_WAIT: Duration = Duration::from_secs(120);
/// How often a wait looks whether somebody wants to stop.
const LOOK: Duration = Duration::from_millis(50);
/// Redirections followed for one request.
const REDIRECTS: usize = 10;
/// Longest answer of the listing: that of a repository with a million files.
const LISTING_BYTES: u64 = 400 << 20;
/// What a segment of a path may hold unescaped.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

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
    retry_after: Option<Duration>,
}

impl Refusal {
    fn read(status: StatusCode, headers: &HeaderMap) -> Self {
        let retry_after = header(headers, "retry-after").and_then(|text| text.trim().parse().ok());
        Self {
            status,
            code: header(headers, "x-error-code").unwrap_or_default(),
            retry_after: retry_after.map(Duration::from_secs),
        }
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
}

/// The connection to one hub.
pub(super) struct Client {
    agent: Agent,
    settings: Settings,
    interrupt: Interrupt,
}

impl Client {
    pub fn new(settings: &Settings, interrupt: &Interrupt) -> Result<Self> {
        let mut tls = TlsConfig::builder();
        if let Some(path) = &settings.certificates {
            tls = tls.root_certs(RootCerts::new_with_certs(&certificates(path)?));
        }
        let wait = Some(settings.timeout);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // Followed here, where it is decided who gets the token.
            .max_redirects(0)
            .user_agent(concat!("gradlens/", env!("CARGO_PKG_VERSION")))
            // Sizes and ranges are those of the files.
            .accept_encoding("identity")
            .timeout_resolve(wait)
            .timeout_connect(wait)
            .timeout_per_read(wait)
            .tls_config(tls.build());
        Ok(Self {
            agent: Agent::new_with_config(config.build()),
            settings: settings.clone(),
            interrupt: interrupt.clone(),
        })
    }

    /// The JSON at `path` of the hub.
    pub fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let url = format!("{}/{path}", self.settings.endpoint);
        self.patiently(TRIES_TO_REACH, || {
            let answer = self.get(&url, 0)?;
            let body = answer.into_body().into_with_config().limit(LISTING_BYTES).read_to_vec();
            let body = body.map_err(|cause| Failure::Unreachable(cause.to_string()))?;
            serde_json::from_slice(&body).map_err(|cause| {
                Error::new("the hub's answer is not what it should be")
                    .at(&url)
                    .expected("JSON about a repository")
                    .found(cause)
                    .hint("does HF_ENDPOINT name a hub?")
                    .into()
            })
        })
    }

    /// The headers that describe the file at `url`, without its content.
    pub fn describe(&self, url: &str) -> Result<HeaderMap, Failure> {
        self.patiently(TRIES, || {
            let mut url = url.to_owned();
            for _ in 0..REDIRECTS {
                let answer = self.call("HEAD", &url, 0)?;
                let described =
                    ["x-linked-etag", "etag"].iter().any(|name| answer.headers().contains_key(*name));
                match location(&url, &answer) {
                    // The first answer that names the content speaks for it; a store behind it has etags of its own.
                    Some(next) if !described => url = next,
                    Some(_) => return Ok(answer.into_parts().0.headers),
                    None => return self.accepted(&url, answer).map(|answer| answer.into_parts().0.headers),
                }
            }
            Err(Failure::Unreachable("too many redirections".into()))
        })
    }

    /// The content at `url` from byte `from` on. One attempt.
    pub fn get(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..REDIRECTS {
            let answer = self.call("GET", &url, from)?;
            match location(&url, &answer) {
                Some(next) => url = next,
                None => return self.accepted(&url, answer),
            }
        }
        Err(Failure::Unreachable("too many redirections".into()))
    }

    fn call(&self, method: &str, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        self.interrupt.check()?;
        let mut request = match method {
            "HEAD" => self.agent.head(url),
            _ => self.agent.get(url),
        };
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        // To the hub alone: never to the store that it sends us to.
        if let Some(token) = self.settings.token.as_ref().filter(|_| self.is_hub(url)) {
            request = request.header("authorization", format!("Bearer {}", token.secret));
        }
        request.call().map_err(|cause| Failure::Unreachable(cause.to_string()))
    }

    fn is_hub(&self, url: &str) -> bool {
        origin(url) == origin(&self.settings.endpoint)
    }

    fn accepted(&self, url: &str, answer: Response<Body>) -> Result<Response<Body>, Failure> {
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let refusal = Refusal::read(status, answer.headers());
        match self.is_hub(url) {
            true => Err(Failure::Refused(refusal)),
            // A store refuses what its signed address no longer allows: asking the hub again gives a fresh one.
            false => Err(Failure::Unreachable(format!("the file store answered {status}"))),
        }
    }

    /// Tries again what may pass, with growing waits.
    pub fn patiently<T>(
        &self,
        tries_to_reach: u32,
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut tried = 0;
        loop {
            let failure = match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            tried += 1;
            let tries = if matches!(failure, Failure::Unreachable(_)) { tries_to_reach } else { TRIES };
            if !failure.may_pass() || tried >= tries {
                return Err(failure);
            }
            self.wait(tried, &failure)?;
        }
    }

    /// Waits after the `tried`th attempt (from 1).
    pub fn wait(&self, tried: u32, failure: &Failure) -> Result<()> {
        let asked = match failure {
            Failure::Refused(Refusal { retry_after: Some(wait), .. }) => (*wait).min(LONGEST_WAIT),
            _ => Duration::ZERO,
        };
        self.pause(asked.max(FIRST_WAIT * 2u32.pow(tried.saturating_sub(1).min(6))))
    }

    /// Sleeps, but not through a wish to stop.
    pub fn pause(&self, wait: Duration) -> Result<()> {
        let mut left = wait;
        while !left.is_zero() {
            self.interrupt.check()?;
            let step = left.min(LOOK);
            sleep(step);
            left -= step;
        }
        self.interrupt.check()
    }

    /// A failure in words. `file` is what was asked for in the repository, if not the repository itself.
    pub fn explain(&self, failure: Failure, repo: &RepoSpec, file: Option<&str>) -> Error {
        let endpoint = &self.settings.endpoint;
        let (noun, id, page) = (repo.kind.noun(), &repo.id, repo.page(endpoint));
        let place = file.map_or_else(|| page.clone(), |file| format!("{page}, file {file}"));
        let refusal = match failure {
            Failure::Final(error) => return error,
            Failure::Unreachable(cause) => {
                return Error::new("the hub cannot be reached").at(place).expected("an answer").found(cause).hint(
                    format!(
                        "on a machine without internet, run `gradlens fetch` with the same flags elsewhere and copy \
                         the cache (HF_HOME); HF_ENDPOINT names another hub than {endpoint}"
                    ),
                );
            }
            Failure::Refused(refusal) => refusal,
        };
        let status = refusal.status;
        let found =
            if refusal.code.is_empty() { status.to_string() } else { format!("{status}, {}", refusal.code) };
        let token = self.settings.token.as_ref();
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
            // Without a good token the hub does not tell what is missing from what is private.
            (401, "RepoNotFound" | "") | (404, _) => error(format!("the hub shows no {noun} {id}"))
                .expected(format!("the id of a {noun} on {endpoint}, or a path on this machine"))
                .hint(format!("check the spelling; if it is private, {login}")),
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

/// The certificates in a PEM file.
fn certificates(path: &std::path::Path) -> Result<Vec<Certificate<'static>>> {
    let what = "cannot read the certificates to trust";
    let pem = fs::read(path).context_path(what, path)?;
    let mut found = Vec::new();
    for item in parse_pem(&pem) {
        if let PemItem::Certificate(certificate) = item.context_path(what, path)? {
            found.push(certificate);
        }
    }
    if found.is_empty() {
        return Err(Error::new(what)
            .at_path(path)
            .expected("certificates in PEM form")
            .found("none")
            .hint("SSL_CERT_FILE, REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE name this file"));
    }
    Ok(found)
}

/// A header's text.
pub(super) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Escapes a path, segment by segment.
pub(super) fn escape(path: &str) -> String {
    path.split('/').map(escape_all).collect::<Vec<_>>().join("/")
}

/// Escapes slashes too: a revision is one segment.
pub(super) fn escape_all(text: &str) -> String {
    utf8_percent_encode(text, SEGMENT).to_string()
}

/// Scheme and host, with the port.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    &url[..end]
}

/// Where an answer sends us, as a whole address.
fn location(url: &str, answer: &Response<Body>) -> Option<String> {
    if !answer.status().is_redirection() {
        return None;
    }
    let location = header(answer.headers(), "location")?;
    Some(if location.contains("://") {
        location
    } else if let Some(rest) = location.strip_prefix("//") {
        let scheme = url.split("://").next().unwrap_or("https");
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{}{location}", origin(url))
    } else {
        let folder = url.rsplit_once('/').map_or(url, |(folder, _)| folder);
        format!("{folder}/{location}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_and_escapes() {
        assert_eq!(origin("http://127.0.0.1:80/a/b"), "http://127.0.0.1:80");
        assert_eq!(origin("https://huggingface.co"), "https://huggingface.co");
        assert_eq!(origin("https://x?y"), "https://x");
        assert_ne!(origin("http://127.0.0.1:81/"), origin("http://127.0.0.1:80/"));
        assert_eq!(escape("a b/c#d.json"), "a%20b/c%23d.json");
        assert_eq!(escape_all("refs/pr/1"), "refs%2Fpr%2F1");
    }

    #[test]
    fn redirections_become_addresses() {
        let to = |location: &str| {
            let answer = Response::builder().status(302).header("location", location);
            super::location("https://hub/a/b?c", &answer.body(Body::builder().data("")).unwrap()).unwrap()
        };
        assert_eq!(to("/x/y"), "https://hub/x/y");
        assert_eq!(to("//cdn/x"), "https://cdn/x");
        assert_eq!(to("http://cdn:1/x?s=1"), "http://cdn:1/x?s=1");
        assert_eq!(to("c"), "https://hub/a/c");
    }
}
