//! The way out: which proxy, if any.

use ureq::{Proxy as Ureq, ProxyProtocol};

use crate::error::{Error, Result};

/// A proxy as a variable names it. It may hold a password, so nothing shows it.
#[derive(Clone)]
pub struct Proxy {
    address: String,
    /// The variable.
    origin: &'static str,
    /// Hosts that are reached without it.
    except: Option<String>,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Proxy(from {})", self.origin)
    }
}

impl Proxy {
    /// The proxy for `endpoint`: that of its scheme before that of all, as Python takes them. `set` gives a variable
    /// that is not empty.
    pub(super) fn of(endpoint: &str, set: &dyn Fn(&str) -> Option<String>) -> Option<Self> {
        let names: [&'static str; 4] = match endpoint.starts_with("https://") {
            true => ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"],
            // Not in capitals: a web server sets that from a header of whoever calls it.
            false => ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"],
        };
        let (origin, address) = names.into_iter().find_map(|name| Some((name, set(name)?)))?;
        let except = ["no_proxy", "NO_PROXY"].into_iter().find_map(set);
        Some(Self { address, origin, except })
    }

    /// As the client wants it.
    ///
    /// # Errors
    /// An address that is none, or a kind of proxy that is not spoken.
    pub(super) fn to_ureq(&self) -> Result<Ureq> {
        let wrong = |found: &str| {
            Error::usage("the proxy cannot be used")
                .at(self.origin)
                .expected("an address like http://host:port")
                .found(found)
                .hint(format!("name an HTTP proxy, or unset {}", self.origin))
        };
        let proxy = Ureq::new(self.address.trim()).map_err(|_| wrong("an address that cannot be read"))?;
        if !matches!(proxy.protocol(), ProxyProtocol::Http | ProxyProtocol::Https) {
            return Err(wrong("a SOCKS proxy"));
        }
        let mut builder = Ureq::builder(proxy.protocol()).host(proxy.host()).port(proxy.port());
        if let Some(name) = proxy.username() {
            builder = builder.username(name);
        }
        if let Some(password) = proxy.password() {
            builder = builder.password(password);
        }
        for host in self.except.iter().flat_map(|hosts| hosts.split(',')).map(str::trim) {
            // A name stands for the names below it too, as in Python.
            builder = builder.no_proxy(host).no_proxy(&format!(".{}", host.trim_start_matches('.')));
        }
        builder.build().map_err(|_| wrong("an address that cannot be read"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(endpoint: &str, variables: &[(&str, &str)]) -> Option<Proxy> {
        Proxy::of(endpoint, &|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_scheme_goes_before_all() {
        let all = [
            ("ALL_PROXY", "http://all:1"),
            ("HTTPS_PROXY", "http://https:2"),
            ("http_proxy", "http://http:3"),
        ];
        assert_eq!(proxy("https://hub", &all).unwrap().address, "http://https:2");
        assert_eq!(proxy("http://hub", &all).unwrap().address, "http://http:3");
        assert_eq!(proxy("https://hub", &all[..1]).unwrap().address, "http://all:1");
        assert!(proxy("https://hub", &all[2..]).is_none());
    }

    #[test]
    fn what_cannot_be_used_is_refused_without_showing_it() {
        let made =
            |address: &str| proxy("https://hub", &[("ALL_PROXY", address), ("NO_PROXY", "a, b")]).unwrap();
        assert!(made("http://user:secret@proxy:3128").to_ureq().is_ok());
        for wrong in ["socks5://user:secret@proxy:1080", "://secret"] {
            let refused = made(wrong).to_ureq().unwrap_err().to_string();
            assert!(refused.contains("ALL_PROXY") && !refused.contains("secret"), "{refused}");
        }
        assert!(!format!("{:?}", made("http://user:secret@proxy:3128")).contains("secret"));
    }
}
