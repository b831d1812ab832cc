//! Encrypted connections: a hub with a certificate of its own, as behind a company's proxy.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::content::texts;
use crate::world::{World, local_arrays};

/// How long one direction is listened to before the other gets its turn.
const TURN: Duration = Duration::from_millis(2);

/// Something that speaks TLS before a hub that does not.
struct Front {
    endpoint: String,
    /// What to trust, in PEM.
    certificate: String,
}

impl Front {
    fn before(hub: &str) -> Self {
        let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let (config, hub) = (Arc::new(config), hub.trim_start_matches("http://").to_owned());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("https://{}", listener.local_addr().unwrap());
        thread::spawn(move || {
            for outside in listener.incoming() {
                let (config, hub) = (Arc::clone(&config), hub.clone());
                thread::spawn(move || carry(outside.unwrap(), &hub, config));
            }
        });
        Self { endpoint, certificate: made.cert.pem() }
    }
}

/// Carries bytes both ways until either side ends.
fn carry(outside: TcpStream, hub: &str, config: Arc<ServerConfig>) {
    let mut inside = TcpStream::connect(hub).unwrap();
    for stream in [&outside, &inside] {
        stream.set_read_timeout(Some(TURN)).unwrap();
    }
    let mut outside = StreamOwned::new(ServerConnection::new(config).unwrap(), outside);
    let mut buffer = vec![0; 1 << 16];
    loop {
        let moved = pass_on(&mut outside, &mut inside, &mut buffer)
            .and_then(|()| pass_on(&mut inside, &mut outside, &mut buffer));
        if moved.is_none() {
            return;
        }
    }
}

/// `None` at the end of either.
fn pass_on(from: &mut impl Read, to: &mut impl Write, buffer: &mut [u8]) -> Option<()> {
    match from.read(buffer) {
        Ok(0) => None,
        Ok(read) => to.write_all(&buffer[..read]).and_then(|()| to.flush()).ok(),
        Err(cause) if matches!(cause.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Some(()),
        Err(_) => None,
    }
}

#[test]
fn a_certificate_is_trusted_when_it_is_named() {
    let mut world = World::new();
    let front = Front::before(&world.hub.endpoint);
    world.dir.set("HF_ENDPOINT", &front.endpoint);
    world.fails("layer", &["cannot be reached", &front.endpoint, "ertificate"]);
    assert!(world.cache().is_empty());
    for variable in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"] {
        let mut world = World::new();
        let front = Front::before(&world.hub.endpoint);
        world.dir.set("HF_ENDPOINT", &front.endpoint);
        world.dir.write("ours.pem", &front.certificate);
        world.dir.set(variable, "ours.pem");
        world.ok("layer --save_outputs --output_dir out");
        assert_eq!(world.arrays("out"), local_arrays("qwen2", &texts("qwen2"), ""));
        fs::remove_file(world.dir.path("ours.pem")).unwrap();
        world.fails("layer", &["certificates", "ours.pem", variable]);
        world.dir.write("ours.pem", "no certificate");
        world.fails("layer", &["certificates", "ours.pem", "PEM", "none", variable]);
    }
}
