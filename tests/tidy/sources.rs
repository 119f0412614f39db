//! What every source file must be, and what none may contain.

use crate::files::{self, File};

const LINES_MAX: usize = 700;

/// The folders of our crates, from the root.
fn crates() -> Vec<(&'static str, &'static str)> {
    let manifests = files::all().iter().filter_map(|file| file.path.strip_suffix("/Cargo.toml"));
    let named = manifests.map(|folder| (folder, folder.rsplit('/').next().unwrap()));
    named.collect()
}

fn find(path: &str) -> Option<&'static File> {
    files::all().iter().find(|file| file.path == path)
}

/// The documentation of a file: the lines at its top that begin with `//!`.
fn docs(file: &File) -> String {
    let lines = file.text.lines().take_while(|line| line.starts_with("//!"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Where `pattern` stands: `path:line`.
fn places(pattern: &str, is_hit: impl Fn(&str) -> bool) -> Vec<String> {
    let mut places = Vec::new();
    for file in files::all().iter().filter(|file| file.text.contains(pattern)) {
        let lines = file.text.lines().enumerate().filter(|(_, line)| is_hit(line));
        places.extend(lines.map(|(number, _)| format!("{}:{}", file.path, number + 1)));
    }
    places
}

fn assert_none(places: &[String], what: &str) {
    assert!(places.is_empty(), "{what}:\n{}", places.join("\n"));
}

#[test]
fn every_crate_says_what_it_is_for_and_what_it_never_does() {
    let mut wrong = Vec::new();
    for (folder, _) in crates() {
        let lib = format!("{folder}/src/lib.rs");
        let docs = find(&lib).map(docs).unwrap_or_default();
        if docs.len() < 80 {
            wrong.push(format!("{lib} does not say what the crate is for"));
        }
        if !docs.contains("ever ") {
            wrong.push(format!("{lib} does not say what the crate never does"));
        }
    }
    assert_none(&wrong, "crate docs");
}

#[test]
fn the_code_map_names_every_crate() {
    let map = &find("ARCHITECTURE.md").expect("there is a code map").text;
    let names = |text: &str| map.contains(&format!("`{text}`"));
    let missing = crates().into_iter().filter(|(folder, name)| !names(folder) && !names(name));
    let missing: Vec<_> = missing.map(|(folder, _)| folder.to_owned()).collect();
    assert_none(&missing, "crates that ARCHITECTURE.md does not name");
}

#[test]
fn the_readme_names_the_two_commands_and_where_to_read_on() {
    let readme = &find("README.md").expect("there is a README").text;
    for part in
        ["cargo run --release -- demo README.md", "cargo test --workspace", "ARCHITECTURE.md"]
    {
        assert!(readme.contains(part), "README.md does not name {part}");
    }
}

#[test]
fn nothing_is_unfinished_or_switched_off() {
    // In pieces, so that this file is not a hit.
    let marks =
        [("to", "do!("), ("unimple", "mented!("), ("#[ig", "nore"), ("(to be wri", "tten)")];
    for (first, second) in marks {
        let mark = format!("{first}{second}");
        assert_none(&places(&mark, |line| line.contains(&mark)), &mark);
    }
}

#[test]
fn no_file_knows_the_machine_it_was_written_on() {
    for folder in ["root", "work", "home", "Users"] {
        let path = format!("/{folder}/");
        assert_none(&places(&path, |line| names_path(line, &path)), &path);
    }
}

/// Whether `path` stands in the line as the beginning of an absolute path, and not within a longer one.
fn names_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || "._-~*})>]/$".contains(c))
    })
}

#[test]
fn only_net_builds_a_tls_configuration() {
    // The last one is a foreign server.
    let allowed = ["crates/net/", "tests/tidy/", "tests/wire/tls.rs"];
    for builder in ["ServerConfig::builder", "ClientConfig::builder"] {
        let hits = places(builder, |line| line.contains(builder)).into_iter();
        let outside = |hit: &String| !allowed.iter().any(|path| hit.starts_with(path));
        let hits: Vec<_> = hits.filter(outside).collect();
        assert_none(&hits, builder);
    }
}

#[test]
fn only_proto_puts_traces_into_messages() {
    let allowed = ["proto/src/", "crates/telemetry/", "tests/tidy/"];
    let header = concat!('"', "traceparent", '"');
    let hits = places(header, |line| line.contains(header)).into_iter();
    let outside = |hit: &String| !allowed.iter().any(|path| hit.starts_with(path));
    assert_none(&hits.filter(outside).collect::<Vec<_>>(), header);
}

#[test]
fn no_source_file_is_long() {
    let sources = files::all().iter().filter(|file| file.is_rust() && !file.is_generated());
    let long = sources.filter(|file| LINES_MAX < file.text.lines().count());
    let long = long.map(|file| format!("{}: {} lines", file.path, file.text.lines().count()));
    assert_none(&long.collect::<Vec<_>>(), &format!("files of more than {LINES_MAX} lines"));
}

#[test]
fn lines_end_clean() {
    let mut wrong = Vec::new();
    for file in files::all().iter().filter(|file| !file.is_generated()) {
        if file.path.starts_with("LICENSE") {
            continue;
        }
        let dirty = file.text.lines().enumerate().filter(|(_, line)| {
            line.ends_with([' ', '\t', '\r']) || (file.is_rust() && line.contains('\t'))
        });
        wrong.extend(dirty.map(|(number, _)| format!("{}:{}", file.path, number + 1)));
        if !file.text.is_empty() && !file.text.ends_with('\n') {
            wrong.push(format!("{} has no newline at its end", file.path));
        }
    }
    assert_none(&wrong, "white space");
}
