//! Plain paragraphs from text that may be Markdown, plain or anything else.
//!
//! No parser of the whole language: what is certainly markup goes, everything else stays. Linear in the text.

use std::mem;

/// How far a link's target or a tag may reach, in bytes.
const TARGET_BYTES_MAX: usize = 2_000;
/// A line shorter than this, before one that begins with no small letter, was ended on purpose and not by wrapping.
const WRAPPED_LINE_CHARS_MIN: usize = 50;

/// A paragraph, a list item, a heading or a row of a table, on one line, without markup.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) text: String,
    /// Whether it is running text, and not a heading, a table or indented code.
    pub(super) prose: bool,
}

pub(super) fn blocks(text: &str) -> Vec<Block> {
    let lines: Vec<&str> = text.lines().collect();
    let mut fences = Fences::default();
    let mut reader = Reader { after_blank: true, ..Reader::default() };
    let mut at = 0;
    while let Some(line) = lines.get(at) {
        at += 1;
        match fence_of(line) {
            Some(fence) => {
                reader.end_block(true);
                at = fences.end(&lines, at, fence);
            }
            None => reader.line(line),
        }
    }
    reader.end_block(true);
    reader.blocks
}

/// The character of the fence that this line opens. A line with code between fences is none.
fn fence_of(line: &str) -> Option<char> {
    let line = line.trim_start();
    let fence = line.chars().next().filter(|first| matches!(first, '`' | '~'))?;
    let rest = line.trim_start_matches(fence);
    (3 <= line.len() - rest.len() && !rest.contains('`')).then_some(fence)
}

/// Remembers which fences are never closed again, so that many of them do not mean many searches.
#[derive(Default)]
struct Fences {
    unclosed: Vec<char>,
}

impl Fences {
    /// The line after the one that closes the fence; a fence that nothing closes hides nothing.
    fn end(&mut self, lines: &[&str], from: usize, fence: char) -> usize {
        if self.unclosed.contains(&fence) {
            return from;
        }
        let closes = |line: &&str| {
            let line = line.trim();
            3 <= line.len() && line.trim_start_matches(fence).is_empty()
        };
        match lines[from..].iter().position(closes) {
            Some(close) => from + close + 1,
            None => {
                self.unclosed.push(fence);
                from
            }
        }
    }
}

#[derive(Default)]
struct Reader {
    blocks: Vec<Block>,
    /// The lines of the block that is being read, joined by spaces.
    raw: String,
    last_line_chars: usize,
    after_blank: bool,
    in_list: bool,
}

impl Reader {
    fn line(&mut self, line: &str) {
        let after_blank = mem::take(&mut self.after_blank);
        let trimmed = line.trim();
        if trimmed.is_empty() {
            self.end_block(true);
            self.after_blank = true;
            return;
        }
        let indented = line.starts_with("    ") || line.starts_with('\t');
        if indented && after_blank && !self.in_list {
            self.single(trimmed, false);
            self.after_blank = true;
            return;
        }
        if after_blank && !line.starts_with([' ', '\t']) {
            self.in_list = false;
        }
        if is_rule(trimmed) {
            let heading = !self.raw.is_empty() && self.raw.chars().count() == self.last_line_chars;
            self.end_block(!heading);
            return;
        }
        if trimmed.starts_with('|') {
            self.table_row(trimmed);
            return;
        }
        if is_reference(trimmed) {
            return;
        }
        let quoted = trimmed.trim_start_matches(['>', ' ']);
        if let Some(heading) = heading_of(quoted) {
            self.single(heading, false);
            return;
        }
        match item_of(quoted) {
            Some(item) => {
                self.end_block(true);
                self.in_list = true;
                self.append(item);
            }
            None => self.append(quoted),
        }
    }

    fn append(&mut self, line: &str) {
        let goes_on = line.chars().next().is_some_and(char::is_lowercase);
        if !goes_on && self.last_line_chars < WRAPPED_LINE_CHARS_MIN {
            self.end_block(true);
        }
        if !self.raw.is_empty() {
            self.raw.push(' ');
        }
        self.raw.push_str(line);
        self.last_line_chars = line.chars().count();
    }

    fn table_row(&mut self, row: &str) {
        let ruler = |c: char| matches!(c, '|' | '-' | ':' | ' ');
        if !row.chars().all(ruler) {
            let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
            self.single(&cells.join("; "), false);
        }
    }

    fn single(&mut self, line: &str, prose: bool) {
        self.end_block(true);
        self.raw.push_str(line);
        self.end_block(prose);
    }

    fn end_block(&mut self, prose: bool) {
        let raw = mem::take(&mut self.raw);
        self.last_line_chars = 0;
        let text = inline(&raw);
        if !text.is_empty() {
            self.blocks.push(Block { text, prose });
        }
    }
}

/// A line of dashes and the like: between paragraphs, or under a heading.
fn is_rule(line: &str) -> bool {
    3 <= line.len() && line.chars().all(|c| matches!(c, '-' | '=' | '*' | '_' | ' '))
}

/// `[name]: target`, which is not shown.
fn is_reference(line: &str) -> bool {
    line.starts_with('[')
        && line.find("]: ").is_some_and(|end| end < 80 && !line[..end].contains(' '))
}

fn heading_of(line: &str) -> Option<&str> {
    let rest = line.trim_start_matches('#');
    let depth = line.len() - rest.len();
    (1..=6)
        .contains(&depth)
        .then_some(rest)?
        .strip_prefix(' ')
        .map(|text| text.trim_end_matches('#'))
}

fn item_of(line: &str) -> Option<&str> {
    let rest = match line.strip_prefix(['-', '*', '+', '•']) {
        Some(rest) => rest,
        None => {
            let digits = line.bytes().take_while(u8::is_ascii_digit).count();
            let rest = (1..=9).contains(&digits).then(|| &line[digits..])?;
            rest.strip_prefix(['.', ')'])?
        }
    };
    let item = rest.strip_prefix(' ')?.trim_start();
    let task = ["[ ] ", "[x] ", "[X] "].iter().find_map(|task| item.strip_prefix(task));
    Some(task.unwrap_or(item))
}

/// Takes emphasis, links, tags and characters that nobody sees out of a line; white space becomes single spaces.
fn inline(raw: &str) -> String {
    let mut marks = Marks::new(raw);
    let mut text = String::with_capacity(raw.len());
    let mut resume_at = 0;
    let mut before = ' ';
    for (at, c) in raw.char_indices() {
        if at < resume_at {
            continue;
        }
        let rest = &raw[at + c.len_utf8()..];
        let next = rest.chars().next().unwrap_or(' ');
        match c {
            '[' if marks.is_label(at) => {}
            '!' if next == '[' && marks.is_label(at + 1) => {}
            ']' => match marks.target_end(at) {
                Some(end) => resume_at = end,
                None => text.push(c),
            },
            '<' => match marks.tag_end(at, next) {
                Some(end) => resume_at = end,
                None => text.push(c),
            },
            '`' => {}
            '~' if next == '~' || before == '~' => {}
            '*' if before != ' ' || !next.is_whitespace() => {}
            '_' if !(before.is_alphanumeric() && next.is_alphanumeric()) => {}
            '\\' if next.is_ascii_punctuation() => {}
            c if c.is_whitespace() || c.is_control() => {
                if !text.is_empty() && !text.ends_with(' ') {
                    text.push(' ');
                }
            }
            c if is_invisible(c) => {}
            c => text.push(c),
        }
        before = c;
    }
    text.truncate(text.trim_end().len());
    text
}

/// Joiners, direction marks and the byte order mark: they would hide words from us, or turn a terminal's text around.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' | '\u{ad}')
}

/// Finds the ends of links and tags. Each search remembers where it ended, so that a megabyte of brackets is read
/// once.
struct Marks<'a> {
    raw: &'a str,
    bracket: NextByte,
    parenthesis: NextByte,
    angle: NextByte,
}

impl<'a> Marks<'a> {
    fn new(raw: &'a str) -> Self {
        let next = |byte| NextByte { byte, found: None };
        Self { raw, bracket: next(b']'), parenthesis: next(b')'), angle: next(b'>') }
    }

    /// Whether the `[` at `at` opens the text of a link.
    fn is_label(&mut self, at: usize) -> bool {
        let end = self.bracket.from(self.raw, at);
        self.raw[end.min(self.raw.len())..].starts_with("](")
            || self.raw[end.min(self.raw.len())..].starts_with("][")
    }

    /// Where the target of the link ends whose text the `]` at `at` ends.
    fn target_end(&mut self, at: usize) -> Option<usize> {
        let end = match self.raw.as_bytes().get(at + 1)? {
            b'(' => self.parenthesis.from(self.raw, at + 2),
            b'[' => self.bracket.from(self.raw, at + 2),
            _ => return None,
        };
        (end < self.raw.len() && end - at < TARGET_BYTES_MAX).then_some(end + 1)
    }

    fn tag_end(&mut self, at: usize, next: char) -> Option<usize> {
        if !next.is_ascii_alphabetic() && !matches!(next, '/' | '!') {
            return None;
        }
        let end = self.angle.from(self.raw, at + 1);
        (end < self.raw.len() && end - at < TARGET_BYTES_MAX).then_some(end + 1)
    }
}

struct NextByte {
    byte: u8,
    found: Option<usize>,
}

impl NextByte {
    /// The first place of the byte at or after `from`, or the end of the text.
    fn from(&mut self, raw: &str, from: usize) -> usize {
        match self.found {
            Some(found) if from <= found => found,
            Some(_) | None => {
                let rest = raw.as_bytes().get(from..).unwrap_or_default();
                let place = rest.iter().position(|byte| *byte == self.byte);
                let found = place.map_or(raw.len(), |place| from + place);
                self.found = Some(found);
                found
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[&str]) {
        let found: Vec<String> = blocks(text).into_iter().map(|block| block.text).collect();
        assert_eq!(found, expected, "{text:?}");
    }

    #[test]
    fn markup_goes_and_text_stays() {
        check("", &[]);
        check("# A *title* #\n\nText", &["A title", "Text"]);
        check("Title\n=====\nText", &["Title", "Text"]);
        check("before\n```rust\nlet x = 1;\n```\nafter", &["before", "after"]);
        check("a ```b``` c", &["a b c"]);
        check("- one\n- [x] two\n3. three\n* four", &["one", "two", "three", "four"]);
        check("> quoted\n> > more", &["quoted more"]);
        check("See [the **guide**](https://a.b/c?d) now.", &["See the guide now."]);
        check("[![alt](a.png)](b.html) text", &["alt text"]);
        check("a [link][ref] b\n\n[ref]: https://a.b", &["a link b"]);
        check("an <b>old</b> tag, 3 < 4 > 2", &["an old tag, 3 < 4 > 2"]);
        check("snake_case and _emphasis_, 3 * 4", &["snake_case and emphasis, 3 * 4"]);
        check("| a | b |\n|---|---|\n| c | d |", &["a; b", "c; d"]);
        check("cite [1] this", &["cite [1] this"]);
        check("so\u{200b}ft\u{ad}ly \u{1b}[31m red", &["softly [31m red"]);
    }

    #[test]
    fn a_fence_that_nothing_closes_hides_nothing() {
        check("a\n```\nb\n~~~\nc", &["a", "b", "c"]);
    }

    #[test]
    fn wrapped_lines_are_joined_and_short_ones_are_not() {
        let long = "This line is so long that it was certainly wrapped by an editor,";
        check(&format!("{long}\nAnd so on."), &[&format!("{long} And so on.")]);
        check("A heading of sorts\nWhat is this?", &["A heading of sorts", "What is this?"]);
        check("it goes\non here", &["it goes on here"]);
    }

    #[test]
    fn headings_tables_and_indented_code_are_no_prose() {
        let prose = |text: &str| blocks(text)[0].prose;
        assert!(prose("Text.") && prose("- item"));
        assert!(!prose("# Title") && !prose("| a | b |") && !prose("    let x = 1;"));
    }
}
