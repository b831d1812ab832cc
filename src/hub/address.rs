//! Addresses: how paths go into them, and where an answer sends us.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ureq::Body;
use ureq::http::Response;

use super::client::header;

/// What a segment of a path may hold unescaped.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Escapes a path, segment by segment.
pub(super) fn escape(path: &str) -> String {
    path.split('/').map(escape_all).collect::<Vec<_>>().join("/")
}

/// Escapes slashes too: a revision is one segment.
pub(super) fn escape_all(text: &str) -> String {
    utf8_percent_encode(text, SEGMENT).to_string()
}

/// Who answers at an address.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub scheme: String,
    pub host: String,
    port: String,
}

/// The origin of an address, in lower case and with its port.
pub(super) fn origin(url: &str) -> Origin {
    let start = root(url).to_ascii_lowercase();
    let (scheme, authority) = start.split_once("://").unwrap_or(("https", &start));
    // After a colon outside the brackets of an IPv6 address.
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port),
        _ => (authority, ""),
    };
    let port = match (port, scheme) {
        ("", "http") => "80",
        ("", _) => "443",
        (port, _) => port,
    };
    Origin { scheme: scheme.to_owned(), host: host.to_owned(), port: port.to_owned() }
}

/// The part of an address before its path.
fn root(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    &url[..end]
}

/// Where an answer sends us, as a whole address.
pub(super) fn location(url: &str, answer: &Response<Body>) -> Option<String> {
    if !answer.status().is_redirection() {
        return None;
    }
    let location = header(answer.headers(), "location")?;
    Some(if ["http://", "https://"].iter().any(|scheme| location.to_ascii_lowercase().starts_with(scheme)) {
        location
    } else if let Some(rest) = location.strip_prefix("//") {
        let scheme = url.split("://").next().unwrap_or("https");
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{}{location}", root(url))
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
        let same = |a: &str, b: &str| origin(a) == origin(b);
        assert!(same("http://127.0.0.1:80/a/b", "http://127.0.0.1"));
        assert!(same("https://Hub.co/x", "https://hub.co:443?y"));
        assert!(same("https://[::1]/x", "https://[::1]:443"));
        for other in [
            "http://hub.co",
            "https://hub.co:444",
            "https://hub.co.evil",
            "https://hub.co@evil",
            "https://evil/hub.co",
        ] {
            assert!(!same("https://hub.co/", other), "{other}");
        }
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
        assert_eq!(to("/x?from=http://y"), "https://hub/x?from=http://y");
    }
}
