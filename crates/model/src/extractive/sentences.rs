//! Sentences of a paragraph, in one pass.
//!
//! Not the Unicode rule: it ends a sentence after every `Dr.` and looks ahead without bound.

/// Where a sentence is cut if nothing ends it: at the next space, or at the next character.
const SENTENCE_BYTES_SOFT: usize = 1_000;
const SENTENCE_BYTES_MAX: usize = 1_200;

const CLOSERS: [char; 10] = ['"', '\'', ')', ']', '}', '”', '’', '»', '“', '«'];
/// Lowercase, without the last dot; single letters (`J. Smith`, `z. B.`) are known without a list.
const ABBREVIATIONS: [&str; 38] = [
    "abs", "approx", "art", "bzw", "ca", "cf", "co", "corp", "d.h", "dept", "dr", "e.g", "ed",
    "evtl", "fig", "gen", "ggf", "hr", "i.e", "inc", "inkl", "jr", "ltd", "mr", "mrs", "ms", "no",
    "nr", "prof", "sr", "st", "u.a", "usw", "vgl", "vol", "vs", "z.b", "zzgl",
];

/// The sentences of `block`, trimmed; those without a letter or digit are left out.
pub(super) fn split(block: &str) -> Vec<&str> {
    let mut sentences = Vec::new();
    let mut start = 0;
    let mut chars = block.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let mut end = at + c.len_utf8();
        let length = end - start;
        let cut = SENTENCE_BYTES_MAX <= length || SENTENCE_BYTES_SOFT <= length && c == ' ';
        let ends = if is_terminator(c) {
            let mut mark = Mark { asks: c == '?' || c == '!', wide: is_wide(c), quoted: false };
            while let Some((_, more)) = chars.next_if(|(_, c)| is_terminator(*c)) {
                mark.asks |= more == '?' || more == '!';
                mark.wide |= is_wide(more);
                end += more.len_utf8();
            }
            while let Some((_, closer)) = chars.next_if(|(_, c)| CLOSERS.contains(c)) {
                mark.quoted = true;
                end += closer.len_utf8();
            }
            mark.ends(&block[start..at], &block[end..])
        } else {
            false
        };
        if ends || cut {
            push(&mut sentences, &block[start..end]);
            start = end;
        }
    }
    push(&mut sentences, &block[start..]);
    sentences
}

/// Whether a sentence ends by asking, also inside quotes.
pub(super) fn is_question(sentence: &str) -> bool {
    sentence.trim_end_matches(CLOSERS).ends_with(['?', '？', '؟'])
}

fn push<'a>(sentences: &mut Vec<&'a str>, piece: &'a str) {
    let piece = piece.trim();
    if piece.chars().any(char::is_alphanumeric) {
        sentences.push(piece);
    }
}

fn is_terminator(c: char) -> bool {
    matches!(c, '.' | '!' | '?' | '…' | '؟') || is_wide(c)
}

/// Marks of scripts that put no space between sentences.
fn is_wide(c: char) -> bool {
    matches!(c, '。' | '！' | '？' | '।')
}

/// The marks at what may be the end of a sentence.
struct Mark {
    asks: bool,
    wide: bool,
    quoted: bool,
}

impl Mark {
    fn ends(&self, before: &str, after: &str) -> bool {
        if self.wide || after.is_empty() {
            return true;
        }
        let Some(after) = after.strip_prefix(' ') else { return false };
        let goes_on = after.chars().next().is_some_and(char::is_lowercase);
        if self.asks {
            // A mark that stands alone is talked about; or it is French, and then a capital follows.
            return !(goes_on && (self.quoted || before.ends_with(' ')));
        }
        !goes_on && (self.quoted || !is_abbreviation(before))
    }
}

fn is_abbreviation(before: &str) -> bool {
    let word = before.rsplit(' ').next().unwrap_or_default();
    let word = word.trim_start_matches(|c: char| !c.is_alphanumeric());
    let single = word.chars().count() == 1 && word != "I" && word.chars().all(char::is_alphabetic);
    single || word.len() <= 6 && ABBREVIATIONS.contains(&word.to_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(block: &str, expected: &[&str]) {
        assert_eq!(split(block), expected, "{block:?}");
    }

    #[test]
    fn a_sentence_ends_where_a_reader_ends_it() {
        check("", &[]);
        check("One. Two! Three? Four", &["One.", "Two!", "Three?", "Four"]);
        check(
            "Dr. Smith met J. Doe, e.g. in Rome. He left.",
            &["Dr. Smith met J. Doe, e.g. in Rome.", "He left."],
        );
        check("Version 1.2 of a.b is out. Go.", &["Version 1.2 of a.b is out.", "Go."]);
        check(
            "\"Why?\" she asked. \"Why not?\" Nobody knew.",
            &["\"Why?\" she asked.", "\"Why not?\"", "Nobody knew."],
        );
        check("what is this? i wonder", &["what is this?", "i wonder"]);
        check("Loop once there is ? or so.", &["Loop once there is ? or so."]);
        check("Pourquoi ? Parce que.", &["Pourquoi ?", "Parce que."]);
        check("Das gilt z. B. hier. Warum?", &["Das gilt z. B. hier.", "Warum?"]);
        check("これは何？水です。", &["これは何？", "水です。"]);
        check("Really?! ... Yes... no.", &["Really?!", "Yes... no."]);
        check("? ? ?", &[]);
    }

    #[test]
    fn a_sentence_without_end_is_cut() {
        let pieces = "word ".repeat(1_000);
        assert!(split(&pieces).iter().all(|piece| piece.len() <= SENTENCE_BYTES_MAX));
        let solid = "ä".repeat(3_000);
        assert!(split(&solid).iter().all(|piece| piece.len() <= SENTENCE_BYTES_MAX));
        assert_eq!(split(&solid).concat(), solid);
    }

    #[test]
    fn questions_are_known_also_in_quotes() {
        assert!(is_question("Why?") && is_question("(Why?)") && is_question("\"Why?\""));
        assert!(!is_question("Why.") && !is_question("Why? Because"));
    }
}
