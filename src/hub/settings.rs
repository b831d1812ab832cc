//! What the environment says about the hub: the variables of the Python package `huggingface_hub`, read the same way.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::proxy::Proxy;
use crate::error::{Context, Error, Result};

/// Where the hub is, unless `HF_ENDPOINT` names a mirror.
const ENDPOINT: &str = "https://huggingface.co";
/// What `huggingface_hub` waits for a connection or for the next bytes.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A secret. It goes into the `Authorization` header and nowhere else: neither `Debug` nor `Display` show it.
#[derive(Clone)]
pub struct Token {
    pub(super) secret: String,
    /// Where it was found: a variable or a file, for messages.
    pub origin: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(from {})", self.origin)
    }
}

/// How to reach the hub, and where its files are kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address without a slash at its end.
    pub endpoint: String,
    /// The shared cache: `HF_HUB_CACHE`, else `hub` in `HF_HOME`.
    pub cache: PathBuf,
    /// Who asks.
    pub token: Option<Token>,
    /// The variable that forbids requests, if one does.
    pub offline: Option<&'static str>,
    /// Longest wait for a connection, and for the next bytes of an answer.
    pub timeout: Duration,
    /// The way out.
    pub proxy: Option<Proxy>,
    /// Certificates to trust instead of the public ones, in PEM, and the variable that names them.
    pub certificates: Option<(PathBuf, &'static str)>,
}

impl Settings {
    /// Reads the environment and the token file.
    ///
    /// # Errors
    /// A token that cannot be one; no home folder to keep the cache in; a timeout that is no number.
    pub fn from_env() -> Result<Self> {
        Self::read(&|name| env::var_os(name).and_then(|value| value.into_string().ok()), dirs::home_dir())
    }

    /// The same from any variables. An empty variable counts as unset.
    fn read(variable: &dyn Fn(&str) -> Option<String>, user_home: Option<PathBuf>) -> Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let path = |name: &str| set(name).map(|value| expand(&value, user_home.as_deref()));
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| user_home.as_ref().map(|home| home.join(".cache/huggingface")))
            .ok_or_else(|| {
                Error::new("there is no home folder to keep downloads in")
                    .at("HOME")
                    .expected("the path of a folder")
                    .found("nothing")
                    .hint("set HF_HOME to a folder")
            })?;
        let cache = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"].into_iter().find_map(path);
        let endpoint = set("HF_ENDPOINT").map_or(ENDPOINT.to_owned(), |url| url.trim().to_owned());
        let timeout = match set("HF_HUB_DOWNLOAD_TIMEOUT") {
            Some(text) => {
                text.trim().parse().ok().filter(|&s| s > 0).map(Duration::from_secs).ok_or_else(|| {
                    Error::usage("the timeout of downloads cannot be read")
                        .at("HF_HUB_DOWNLOAD_TIMEOUT")
                        .expected("seconds, 1 or more")
                        .found(text)
                })?
            }
            None => TIMEOUT,
        };
        let endpoint = check_endpoint(endpoint.trim_end_matches('/'))?;
        Ok(Self {
            proxy: Proxy::of(&endpoint, &set),
            endpoint,
            cache: cache.unwrap_or_else(|| home.join("hub")),
            token: token(&set, &path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token")))?,
            offline: ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]
                .into_iter()
                .find(|name| set(name).is_some_and(|value| is_true(&value))),
            timeout,
            certificates: ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]
                .into_iter()
                .find_map(|name| Some((path(name)?, name))),
        })
    }
}

fn check_endpoint(endpoint: &str) -> Result<String> {
    let host = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
    if host.is_some_and(|host| !host.is_empty() && !host.contains([' ', '?', '#', '@'])) {
        return Ok(endpoint.to_owned());
    }
    Err(Error::usage("the address of the hub cannot be used")
        .at("HF_ENDPOINT")
        .expected(format!("an address like {ENDPOINT}"))
        .found(match endpoint.contains('@') {
            true => "an address with a user or a password, which are not shown".to_owned(),
            false => format!("{endpoint:?}"),
        }))
}

/// The token of the environment, else of the file that `hf auth login` writes.
fn token(set: &dyn Fn(&str) -> Option<String>, file: &Path) -> Result<Option<Token>> {
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
        if let Some(secret) = set(name) {
            return checked(&secret, name.to_owned()).map(Some);
        }
    }
    if set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|value| is_true(&value)) {
        return Ok(None);
    }
    match fs::read_to_string(file) {
        Ok(secret) if secret.trim().is_empty() => Ok(None),
        Ok(secret) => checked(&secret, file.display().to_string()).map(Some),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
        // Text that is no UTF-8 would be shown by nobody's error.
        Err(cause) => Err(cause).context_path("cannot read the hub's token", file),
    }
}

/// A header holds visible ASCII only. Says what is wrong without showing any of it.
fn checked(secret: &str, origin: String) -> Result<Token> {
    let secret = secret.trim();
    if let Some(at) = secret.find(|c: char| !c.is_ascii_graphic()) {
        return Err(Error::usage("the hub's token is not one")
            .at(origin)
            .expected("letters and digits in one line, as in hf_…")
            .found(format!("a blank, a line break or another odd character at place {}", at + 1))
            .hint("copy the token again"));
    }
    Ok(Token { secret: secret.to_owned(), origin })
}

/// As `huggingface_hub` reads switches.
fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.trim().to_ascii_lowercase().as_str())
}

/// `~` at the start is the home folder.
fn expand(path: &str, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix('~'), home) {
        (Some(""), Some(home)) => home.to_owned(),
        (Some(rest), Some(home)) if rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
        _ => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings> {
        let find = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        Settings::read(&find, Some("/home/me".into()))
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        let cache = |variables: &[(&str, &str)]| read(variables).unwrap().cache;
        assert_eq!(cache(&[]), Path::new("/home/me/.cache/huggingface/hub"));
        assert_eq!(cache(&[("HF_HOME", "")]), Path::new("/home/me/.cache/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        let home = ("HF_HOME", "~/hf");
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]), Path::new("/home/me/hf/hub"));
        assert_eq!(cache(&[home, ("HUGGINGFACE_HUB_CACHE", "/old")]), Path::new("/old"));
        assert_eq!(
            cache(&[home, ("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/c")]),
            Path::new("/c")
        );
    }

    #[test]
    fn switches_and_addresses() {
        assert_eq!(read(&[]).unwrap().endpoint, ENDPOINT);
        assert_eq!(read(&[("HF_ENDPOINT", "http://127.0.0.1:1/")]).unwrap().endpoint, "http://127.0.0.1:1");
        for wrong in ["huggingface.co", "ftp://x", "https://", "https://user@x"] {
            assert!(read(&[("HF_ENDPOINT", wrong)]).is_err(), "{wrong}");
        }
        for (value, offline) in [("1", true), ("True", true), ("ON", true), ("0", false), ("", false)] {
            assert_eq!(read(&[("HF_HUB_OFFLINE", value)]).unwrap().offline.is_some(), offline, "{value}");
        }
        assert!(read(&[("TRANSFORMERS_OFFLINE", "yes")]).unwrap().offline.is_some());
        assert!(read(&[("HF_HUB_DOWNLOAD_TIMEOUT", "soon")]).is_err());
    }

    #[test]
    fn a_token_is_found_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        assert!(read(&[("HF_HOME", home)]).unwrap().token.is_none());
        fs::write(folder.path().join("token"), "hf_file\n").unwrap();
        let token = |variables: &[(&str, &str)]| {
            let home = ("HF_HOME", home);
            read(&[&[home], variables].concat()).unwrap().token.map(|token| token.secret)
        };
        assert_eq!(token(&[]).unwrap(), "hf_file");
        assert_eq!(token(&[("HF_TOKEN", " hf_variable ")]).unwrap(), "hf_variable");
        assert!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).is_none());
        let settings = read(&[("HF_TOKEN", "hf_secret")]).unwrap();
        assert!(!format!("{settings:?}").contains("hf_secret"));
        let refused = read(&[("HF_TOKEN", "hf_sec\nret")]).unwrap_err().to_string();
        assert!(refused.contains("HF_TOKEN") && !refused.contains("hf_sec"), "{refused}");
    }
}
