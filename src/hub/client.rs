//! Requests: what is asked, who gets the token, what is tried again, and what a refusal means.

use std::fs;
use std::io::Read;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::sleep;
use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::http::{HeaderMap, Response};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::address::{location, origin};
use super::failure::{Failure, Refusal};
use super::proxy::Proxy;
use super::{Note, RepoSpec, Settings};
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
/// A wait that is worth a word.
const LONG_WAIT: Duration = Duration::from_secs(5);
/// How often a wait looks whether somebody wants to stop.
pub(super) const LOOK: Duration = Duration::from_millis(50);
const BUFFER_BYTES: usize = 1 << 18;
/// Buffers that wait to be used.
const BUFFERS_AHEAD: usize = 4;
/// Redirections followed for one request.
const REDIRECTS: usize = 10;
/// Longest answer of the listing: that of a repository with a million files.
const LISTING_BYTES: u64 = 400 << 20;
/// What the hub says of a file.
pub(super) struct Description {
    /// Names the content: its hash.
    pub etag: String,
    pub bytes: Option<u64>,
}

impl Description {
    /// `otherwise` is the header of the size where the hub does not speak for a store.
    fn read(headers: &HeaderMap, otherwise: &str) -> Self {
        let first = |names: [&str; 2]| names.iter().find_map(|name| header(headers, name));
        Self {
            etag: first(["x-linked-etag", "etag"]).unwrap_or_default(),
            bytes: first(["x-linked-size", otherwise]).and_then(|text| text.trim().parse().ok()),
        }
    }
}

/// The connection to one hub.
pub(super) struct Client {
    agent: Agent,
    settings: Settings,
    interrupt: Interrupt,
    note: Note,
}

impl Client {
    pub fn new(settings: &Settings, interrupt: &Interrupt, note: Note) -> Result<Self> {
        let mut tls = TlsConfig::builder();
        if let Some((path, variable)) = &settings.certificates {
            let certificates =
                certificates(path).map_err(|error| error.hint(format!("{variable} names this file")))?;
            tls = tls.root_certs(RootCerts::new_with_certs(&certificates));
        }
        let wait = Some(settings.timeout);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // Followed here, where it is decided who gets the token.
            .max_redirects(0)
            .user_agent(concat!("gradlens/", env!("CARGO_PKG_VERSION")))
            // Sizes and ranges are those of the files.
            .accept_encoding("identity")
            .proxy(settings.proxy.as_ref().map(Proxy::to_ureq).transpose()?)
            .timeout_resolve(wait)
            .timeout_connect(wait)
            .timeout_per_read(wait)
            .tls_config(tls.build());
        Ok(Self {
            agent: Agent::new_with_config(config.build()),
            settings: settings.clone(),
            interrupt: interrupt.clone(),
            note,
        })
    }

    /// The JSON at `url`, and the address of the page after it.
    pub fn page<T: DeserializeOwned>(&self, url: &str) -> Result<(T, Option<String>), Failure> {
        self.patiently(TRIES_TO_REACH, || {
            let answer = self.get(url, 0)?;
            let next = header(answer.headers(), "link").and_then(|links| next_page(&links));
            let body = self.read(answer)?;
            let page = serde_json::from_slice(&body).map_err(|cause| {
                Error::new("the hub's answer is not what it should be")
                    .at(url)
                    .expected("JSON about a repository")
                    .found(cause)
                    .hint("does HF_ENDPOINT name a hub?")
            })?;
            Ok((page, next.filter(|next| self.is_hub(next))))
        })
    }

    /// All that an answer holds.
    fn read(&self, answer: Response<Body>) -> Result<Vec<u8>, Failure> {
        let arriving = read_ahead(answer.into_body().into_with_config().limit(LISTING_BYTES).reader());
        let mut all = Vec::new();
        loop {
            self.interrupt.check()?;
            match arriving.recv_timeout(LOOK) {
                Ok(Ok(bytes)) => all.extend(bytes),
                Ok(Err(cause)) => return Err(Failure::Unreachable(cause.to_string())),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(all),
            }
        }
    }

    /// What the hub says of the file at `url`, without its content.
    pub fn describe(&self, url: &str) -> Result<Description, Failure> {
        self.patiently(TRIES, || {
            let mut url = url.to_owned();
            for _ in 0..REDIRECTS {
                let answer = self.call("HEAD", &url, 0)?;
                let next = location(&url, &answer);
                let described =
                    ["x-linked-etag", "etag"].iter().any(|name| answer.headers().contains_key(*name));
                match next {
                    // What the hub says before it sends us to a store is what counts: a store has etags of its own.
                    Some(next) if self.is_hub(&next) || !described => url = next,
                    Some(_) => return Ok(Description::read(answer.headers(), "x-linked-size")),
                    None => {
                        let answer = self.accepted(&url, answer)?;
                        return Ok(Description::read(answer.headers(), "content-length"));
                    }
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
        // On a thread of its own: a hub that falls silent must not keep a wish to stop waiting.
        let (sender, answer) = sync_channel(1);
        let ask = move || drop(sender.send(request.call()));
        std::thread::Builder::new()
            .name("hub".into())
            .spawn(ask)
            .context("cannot start a thread to ask the hub")?;
        loop {
            match answer.recv_timeout(LOOK) {
                Ok(answer) => return answer.map_err(|cause| Failure::Unreachable(reason(&cause))),
                Err(RecvTimeoutError::Timeout) => self.interrupt.check()?,
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::Unreachable("no answer".into())),
            }
        }
    }

    /// Whether the token may go to `url`: to the hub's own host and port, and never from https to http.
    fn is_hub(&self, url: &str) -> bool {
        let (hub, other) = (origin(&self.settings.endpoint), origin(url));
        hub == other
            || (hub.host == other.host && (hub.scheme.as_str(), other.scheme.as_str()) == ("http", "https"))
    }

    fn accepted(&self, url: &str, answer: Response<Body>) -> Result<Response<Body>, Failure> {
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let refusal = Refusal::read(status, answer.headers());
        // A mirror may send us to another hub, which speaks as one.
        match self.is_hub(url) || refusal.is_a_hubs() {
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
            self.wait(tried, &failure, &|| self.interrupt.check())?;
        }
    }

    /// Waits after the `tried`th attempt (from 1), as long as `check` lets it.
    pub fn wait(&self, tried: u32, failure: &Failure, check: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut left = FIRST_WAIT * 2u32.pow(tried.saturating_sub(1).min(6));
        if let Failure::Refused(Refusal { retry_after: Some(asked), .. }) = failure {
            left = left.max((*asked).min(LONGEST_WAIT));
        }
        if left >= LONG_WAIT {
            (self.note)(&format!("the hub asks to wait: trying again in {} s", left.as_secs()));
        }
        while !left.is_zero() {
            check()?;
            let step = left.min(LOOK);
            sleep(step);
            left -= step;
        }
        check()
    }

    /// A failure in words. `file` is what was asked for in the repository, if not the repository itself.
    pub fn explain(&self, failure: Failure, repo: &RepoSpec, file: Option<&str>) -> Error {
        failure.explain(&self.settings, repo, file)
    }
}

/// The bytes of `body`, read on a thread of their own: a connection that falls silent must not keep a wish to stop
/// waiting. The thread ends with the body or, once nobody listens, with the next bytes or the timeout.
pub(super) fn read_ahead(mut body: impl Read + Send + 'static) -> Receiver<std::io::Result<Vec<u8>>> {
    let (sender, arriving) = sync_channel(BUFFERS_AHEAD);
    let read = move || {
        loop {
            let mut buffer = vec![0; BUFFER_BYTES];
            let read = body.read(&mut buffer).map(|read| {
                buffer.truncate(read);
                buffer
            });
            // The end, which the hung-up channel tells.
            if read.as_ref().is_ok_and(Vec::is_empty) {
                return;
            }
            let failed = read.is_err();
            if sender.send(read).is_err() || failed {
                return;
            }
        }
    };
    // Without a thread the channel hangs up at once: the attempt brought nothing, and is made again.
    let _ = std::thread::Builder::new().name("download".into()).spawn(read);
    arriving
}

/// The address of the next page in a `Link` header: `<https://…>; rel="next"`.
fn next_page(links: &str) -> Option<String> {
    let link = links.split(',').find(|link| link.contains("rel=\"next\""))?;
    Some(link.split_once('<')?.1.split_once('>')?.0.to_owned())
}

/// What went wrong, without the word `io: ` before what the system says.
fn reason(cause: &ureq::Error) -> String {
    match cause {
        ureq::Error::Io(cause) => cause.to_string(),
        other => other.to_string(),
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
        return Err(Error::new(what).at_path(path).expected("certificates in PEM form").found("none"));
    }
    Ok(found)
}

/// A header's text.
pub(super) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}
