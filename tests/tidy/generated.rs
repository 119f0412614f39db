//! The committed code in `proto/src/gen` is what the `.proto` files make.
//!
//! After a change of a `.proto` file regenerate first, then change the code that uses it: this test is built with it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::files::root;

/// Set, the committed files are written instead of compared.
const UPDATE: &str = "UPDATE";

fn read(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    let files = entries.filter(|entry| entry.file_name() != "mod.rs");
    let files = files
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()));
    files.collect()
}

#[test]
fn the_generated_code_is_what_the_proto_files_make() {
    let proto = root().join("proto");
    let committed = proto.join("src/gen");
    let fresh = tempfile::tempdir().unwrap();
    tests::codegen::generate(&proto, fresh.path()).unwrap();
    if std::env::var_os(UPDATE).is_some() {
        for (name, bytes) in read(fresh.path()) {
            fs::write(committed.join(name), bytes).unwrap();
        }
    }
    let (fresh, committed) = (read(fresh.path()), read(&committed));
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&committed), names(&fresh), "{REMEDY}");
    for (name, bytes) in &fresh {
        assert!(committed[name] == *bytes, "proto/src/gen/{name} is old; {REMEDY}");
    }
}

const REMEDY: &str = "regenerate with `UPDATE=1 cargo test -p tests --test tidy`, and commit";
