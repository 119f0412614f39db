//! The files of the repository, as they lie there: also those that are not committed yet.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// Made, not written.
const SKIPPED: [&str; 4] = [".git", "target", "node_modules", ".cargo"];

/// One file that is text.
pub(crate) struct File {
    /// From the root, with `/`.
    pub(crate) path: String,
    pub(crate) text: String,
}

impl File {
    pub(crate) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    pub(crate) fn is_generated(&self) -> bool {
        self.path.starts_with("proto/src/gen/") || self.path == "Cargo.lock"
    }
}

static FILES: LazyLock<Vec<File>> = LazyLock::new(|| {
    let mut paths = Vec::new();
    collect(&root(), &mut paths);
    paths.sort();
    // What is no UTF-8 is no text.
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).ok()?;
        let path = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        Some(File { path, text })
    };
    paths.into_iter().filter_map(read).collect()
});

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

pub(crate) fn all() -> &'static [File] {
    &FILES
}

fn collect(dir: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            if !SKIPPED.iter().any(|skipped| name == *skipped) {
                collect(&entry.path(), paths);
            }
        } else if kind.is_file() && name != ".git" {
            // In a second work tree `.git` is a file.
            paths.push(entry.path());
        }
    }
}
