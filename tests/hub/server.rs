//! A hub on this machine: it answers as huggingface.co does, sends large files from a second port as their content
//! network does, keeps a log of what it was asked, and fails where it is told to.

use std::collections::BTreeMap;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::answers;
use crate::http::{Head, Reply};
use crate::repo::{Content, Kind, Repository};

/// What a request was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Facts about a repository, or the listing of its files.
    Api,
    /// The address of a file, which is answered with a redirect.
    Resolve,
    /// The bytes of a file, behind that redirect.
    Content,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// This status; 429 says to come back in a second.
    Status(u16),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// The connection falls silent after so many bytes of the body.
    Stall(usize),
    /// The file has only so many bytes: nothing but the announced size tells.
    Short(usize),
    /// A byte in the middle of the file is another.
    Corrupt,
    /// `Range` is not understood: the whole file, with status 200.
    NoRange,
    /// The same, but only so many bytes of it, whose number is not announced: the connection ends in order.
    NoLength(usize),
}

/// A request as the log keeps it.
#[derive(Clone, Debug)]
pub struct Request {
    pub place: Place,
    /// Whether it came to the second port.
    pub cdn: bool,
    pub method: String,
    /// As it was sent.
    pub target: String,
    /// The repository for [`Place::Api`], else the file's path in it.
    pub name: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
    pub status: u16,
    /// Bytes of the body that went out.
    pub sent: usize,
}

impl Request {
    /// Where its range starts; 0 for a whole file.
    pub fn start(&self) -> usize {
        let range = self.range.as_deref().and_then(|range| range.strip_prefix("bytes="));
        range.map_or(0, |range| range.split('-').next().unwrap().parse().unwrap())
    }
}

struct Rule {
    place: Place,
    name: String,
    fault: Fault,
    times: usize,
}

/// What the connections share.
#[derive(Default)]
pub struct State {
    pub repositories: Mutex<Vec<Repository>>,
    /// Token → gated and private repositories it may see.
    pub tokens: Mutex<BTreeMap<String, Vec<String>>>,
    /// Path on the second port → the file's path in its repository, and the file.
    pub large: Mutex<BTreeMap<String, (String, Content)>>,
    /// The address of the second port.
    pub cdn: String,
    rules: Mutex<Vec<Rule>>,
    log: Mutex<Vec<Request>>,
    closing: AtomicBool,
}

impl State {
    /// The fault that a request meets, if any.
    pub fn fault(&self, place: Place, name: &str) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap();
        let fits = |rule: &&mut Rule| rule.times > 0 && rule.place == place && rule.name == name;
        let rule = rules.iter_mut().find(fits)?;
        rule.times = rule.times.saturating_sub(usize::from(rule.times != usize::MAX));
        Some(rule.fault)
    }
}

/// A running hub; it ends when it is dropped.
pub struct Hub {
    /// For `HF_ENDPOINT`.
    pub endpoint: String,
    state: Arc<State>,
    addresses: Vec<String>,
}

impl Hub {
    pub fn start() -> Self {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let addresses: Vec<String> = listeners.iter().map(|l| l.local_addr().unwrap().to_string()).collect();
        let state = Arc::new(State { cdn: format!("http://{}", addresses[1]), ..State::default() });
        for (listener, cdn) in listeners.into_iter().zip([false, true]) {
            let state = Arc::clone(&state);
            thread::spawn(move || listen(&listener, cdn, &state));
        }
        Self { endpoint: format!("http://{}", addresses[0]), state, addresses }
    }

    /// Adds a repository, in the place of one with the same kind and id.
    pub fn add(&self, repository: Repository) {
        let mut all = self.state.repositories.lock().unwrap();
        all.retain(|old| (old.kind, &old.id) != (repository.kind, &repository.id));
        all.push(repository);
    }

    #[track_caller]
    pub fn repository(&self, kind: Kind, id: &str) -> Repository {
        let all = self.state.repositories.lock().unwrap();
        all.iter().find(|one| one.kind == kind && one.id == id).unwrap().clone()
    }

    /// Makes a token known; it opens these gated or private repositories.
    pub fn token(&self, token: &str, opens: &[&str]) {
        let opens = opens.iter().map(|id| (*id).to_owned()).collect();
        self.state.tokens.lock().unwrap().insert(token.into(), opens);
    }

    /// The next `times` requests for `name` at `place` go wrong. Faults of one place come in the order given.
    pub fn fault(&self, place: Place, name: &str, fault: Fault, times: usize) {
        self.state.rules.lock().unwrap().push(Rule { place, name: name.into(), fault, times });
    }

    /// Ends all faults.
    pub fn heal(&self) {
        self.state.rules.lock().unwrap().clear();
    }

    /// The log; it starts anew.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.log.lock().unwrap())
    }

    /// Those of the log that asked for the bytes of files; it starts anew.
    pub fn content_requests(&self) -> Vec<Request> {
        let content = |request: &Request| request.place == Place::Content && request.method == "GET";
        self.requests().into_iter().filter(content).collect()
    }

    /// Whether the second port was ever shown a token since the log started.
    pub fn cdn_saw_a_token(&self) -> bool {
        let log = self.state.log.lock().unwrap();
        log.iter().any(|request| request.cdn && request.authorization.is_some())
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.state.closing.store(true, Ordering::SeqCst);
        // Wakes the listeners, which see the flag.
        for address in &self.addresses {
            drop(TcpStream::connect(address));
        }
    }
}

fn listen(listener: &TcpListener, cdn: bool, state: &Arc<State>) {
    for stream in listener.incoming() {
        if state.closing.load(Ordering::SeqCst) {
            return;
        }
        let (Ok(stream), state) = (stream, Arc::clone(state)) else { continue };
        thread::spawn(move || serve(&stream, cdn, &state));
    }
}

/// One request per connection.
fn serve(stream: &TcpStream, cdn: bool, state: &State) {
    let Some(head) = Head::read(stream) else { return };
    let (place, name, reply) = answers::answer(state, &head, cdn);
    // Before the answer, so that who has the answer finds it in the log.
    state.log.lock().unwrap().push(Request {
        place,
        cdn,
        method: head.method.clone(),
        target: head.target.clone(),
        name,
        range: head.header("range").map(str::to_owned),
        authorization: head.header("authorization").map(str::to_owned),
        status: reply.status,
        sent: if head.method == "HEAD" { 0 } else { reply.sent() },
    });
    if reply.send(stream, &head.method).is_ok() && reply.stall {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(300) && !state.closing.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Applies what can go wrong on the way of a file.
pub fn spoil(reply: Reply, fault: Option<Fault>) -> Reply {
    let mut reply = reply;
    match fault {
        Some(Fault::Cut(bytes)) => reply.cut = Some(bytes),
        Some(Fault::Stall(bytes)) => (reply.cut, reply.stall) = (Some(bytes), true),
        Some(Fault::NoLength(_)) => reply.length = false,
        Some(Fault::Status(_) | Fault::Short(_) | Fault::Corrupt | Fault::NoRange) | None => {}
    }
    reply
}
