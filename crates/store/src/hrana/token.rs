//! A secret that stands in a file. Never shown, and read again when the server does not take it any more.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use hyper::header::HeaderValue;

use crate::Error;

/// A header `authorization`.
pub(super) struct Token {
    path: PathBuf,
    /// What stands before the secret.
    scheme: &'static str,
    header: RwLock<HeaderValue>,
}

impl Token {
    /// Blocks for the moment that it takes to read the file.
    pub(super) fn load(path: &Path, scheme: &'static str) -> Result<Arc<Self>, Error> {
        let text = std::fs::read_to_string(path);
        let header = header(path, scheme, text)?;
        Ok(Arc::new(Self { path: path.to_owned(), scheme, header: RwLock::new(header) }))
    }

    pub(super) fn header(&self) -> HeaderValue {
        self.header.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the file again. Whether there is another token than the one that was refused.
    pub(super) async fn renew(&self, refused: &HeaderValue) -> Result<bool, Error> {
        let text = tokio::fs::read_to_string(&self.path).await;
        // It may be just being replaced.
        let header = header(&self.path, self.scheme, text)
            .map_err(|error| Error::Denied { what: error.to_string() })?;
        let is_new = header != refused;
        *self.header.write().unwrap_or_else(PoisonError::into_inner) = header;
        Ok(is_new)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

fn header(path: &Path, scheme: &str, text: std::io::Result<String>) -> Result<HeaderValue, Error> {
    let shown = path.display();
    let text =
        text.map_err(|error| Error::invalid(format!("cannot read token file {shown}: {error}")))?;
    let token = text.trim();
    if token.is_empty() {
        return Err(Error::invalid(format!("token file {shown} is empty")));
    }
    let header = HeaderValue::from_str(&format!("{scheme} {token}"));
    let mut header = header.map_err(|_| {
        Error::invalid(format!("token file {shown} holds more than one line of text"))
    })?;
    header.set_sensitive(true);
    Ok(header)
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_is_renewed_from_its_file_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "first\n").unwrap();
        let token = Token::load(&path, "Bearer").unwrap();
        let first = token.header();
        assert_eq!(first.to_str().unwrap(), "Bearer first");
        assert!(!token.renew(&first).await.unwrap());
        std::fs::write(&path, "second").unwrap();
        assert!(token.renew(&first).await.unwrap());
        assert_eq!(token.header().to_str().unwrap(), "Bearer second");
        assert!(!format!("{token:?} {:?}", token.header()).contains("second"));
        // While the file is replaced it may be empty, or not there: that is tried again, like a refusal.
        std::fs::write(&path, "").unwrap();
        assert!(matches!(token.renew(&first).await, Err(Error::Denied { .. })));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(token.renew(&first).await, Err(Error::Denied { .. })));
        assert_eq!(token.header().to_str().unwrap(), "Bearer second");
    }

    #[test]
    fn a_file_without_a_token_is_named_and_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        for text in ["", " \n", "secret\nsecret"] {
            std::fs::write(&path, text).unwrap();
            let refused = Token::load(&path, "Bearer").unwrap_err().to_string();
            assert!(refused.contains(path.to_str().unwrap()), "{refused}");
            assert!(!refused.contains("secret"), "{refused}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(Token::load(&path, "Bearer"), Err(Error::Invalid { .. })));
    }
}
