//! Words of a sentence, and which of them say what a text is about.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use unicode_segmentation::UnicodeSegmentation;

/// A longer word is no word that anybody would look for.
const WORD_BYTES_MAX: usize = 48;

/// Words that every text has.
const ENGLISH: &str = "a about above across actually after again against ago all almost alone along already also
although always am among an and another any anybody anyone anything anyway are aren't around as ask asked asks at away
back be became because become becomes been before began begin being below between both but by called came can can't
cannot come comes could couldn't did didn't do does doesn't doing don't done down during each eg either else enough
especially etc even ever every everybody everyone everything except far few first for found from further gave get gets
getting give given gives go goes going gone got had hadn't happen happened happens has hasn't have haven't having he
he'd he'll he's held hence her here hers herself him himself his how however i i'd i'll i'm i've ie if in indeed inside
instead into is isn't it it'll it's its itself just keep keeps kept knew know known knows last later least less let let's
like likely look looked looks made mainly make makes making many may maybe me mean means might mine more most mostly much
must mustn't my myself near nearly need needs neither never next no nobody none nor not nothing now of off often on once
one ones only onto or other others otherwise ought our ours ourselves out outside over own per perhaps please put quite
rather really said same saw say says see seem seemed seems seen several shall she she'd she'll she's should shouldn't
since so some somebody someone something sometimes soon still such sure take taken takes tell than that that's the their
theirs them themselves then there there's therefore these they they'd they'll they're they've thing things think this
those though through thus till to today together told too took toward towards tried try turned two under unless until up
upon us use used uses using usually very via want wanted wants was wasn't we we'd we'll we're we've well went were
weren't what what's whatever when whenever where whether which while who who's whole whom whose why will with within
without won't would wouldn't yes yet you you'd you'll you're you've your yours yourself e.g i.e";

const GERMAN: &str = "aber alle allem allen aller alles als also am an ander andere anderem anderen anderer anderes
auch auf aus bei beim bin bis bist da dabei dadurch daher damit danach dann daran darauf darin darum das dass davon dazu
dein deine dem den denn der deren des deshalb dessen die dies diese diesem diesen dieser dieses doch dort du durch ein
eine einem einen einer eines einige er es etwa etwas euch euer für gegen gibt hab habe haben hat hatte hatten hier hin
hinter ich ihm ihn ihnen ihr ihre ihrem ihren ihrer im immer in indem ins ist ja jede jedem jeden jeder jedes jedoch jetzt
kann kein keine keinem keinen keiner können könnte machen man manche mehr mein meine mich mir mit muss musste nach nicht
nichts noch nun nur ob oder ohne schon sehr sein seine seinem seinen seiner seit sich sie sind so soll sollte sondern
sonst um und uns unser unsere unter viel vom von vor war waren warum was weil weiter welche welchem welchen welcher
welches wenn wer werde werden wie wieder will wir wird wirst wo wollen wurde wurden während zu zum zur zwar zwischen über";

static STOP_WORDS: LazyLock<HashSet<&'static str>> =
    LazyLock::new(|| ENGLISH.split_whitespace().chain(GERMAN.split_whitespace()).collect());

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Says what the text is about.
    Content,
    /// May end a term (`sector 7`), never begins one.
    Number,
    /// Every text has it, or it is part of an address.
    Stop,
}

/// A word of a sentence, found again there by its place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Word {
    /// The same for all forms of a word (see [`Keys`]).
    pub(super) key: u32,
    pub(super) start: u32,
    pub(super) end: u32,
    pub(super) kind: Kind,
    /// Only a space or a hyphen is between it and the word before.
    pub(super) joined: bool,
    pub(super) capital: bool,
}

/// Numbers for words: the same for `Valve`, `valves` and `valve's`. Numbered as they come, so that the same text
/// always gives the same numbers.
#[derive(Default)]
pub(super) struct Keys(HashMap<String, u32>);

impl Keys {
    fn key(&mut self, folded: String) -> u32 {
        let next = u32::try_from(self.0.len()).expect("a text has fewer than 2^32 words");
        *self.0.entry(folded).or_insert(next)
    }

    /// The number of a word of this text, folded already.
    pub(super) fn get(&self, folded: &str) -> Option<u32> {
        self.0.get(folded).copied()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Appends the words of `sentence` to `words`.
pub(super) fn read(sentence: &str, keys: &mut Keys, words: &mut Vec<Word>) {
    let mut previous_end = None;
    for (offset, piece) in pieces(sentence) {
        let address = piece.contains("://");
        for (at, text) in piece.unicode_word_indices() {
            let (start, end) = (offset + at, offset + at + text.len());
            let gap = previous_end.map(|previous: usize| &sentence[previous..start]);
            let folded = fold(text);
            let kind = if address { Kind::Stop } else { kind_of(text, &folded) };
            words.push(Word {
                key: keys.key(folded),
                start: place(start),
                end: place(start + bare(text).len()),
                kind,
                joined: matches!(gap, Some(" " | "-" | "\u{2010}" | "\u{2011}")),
                capital: text.chars().next().is_some_and(char::is_uppercase),
            });
            previous_end = Some(end);
        }
    }
}

/// The folded content words of any text, once each, in order.
pub(super) fn content_of(text: &str) -> Vec<String> {
    let mut seen = HashSet::new();
    let words = pieces(text).filter(|(_, piece)| !piece.contains("://"));
    let words = words.flat_map(|(_, piece)| piece.unicode_words());
    words
        .map(|word| (word, fold(word)))
        .filter(|(word, folded)| kind_of(word, folded) == Kind::Content)
        .filter_map(|(_, folded)| seen.insert(folded.clone()).then_some(folded))
        .collect()
}

/// What stands between spaces, with its place.
fn pieces(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut offset = 0;
    text.split(' ').map(move |piece| {
        let at = offset;
        offset += piece.len() + 1;
        (at, piece)
    })
}

fn place(at: usize) -> u32 {
    u32::try_from(at).expect("a sentence is cut long before 4 GiB")
}

/// Without the ending of a genitive.
fn bare(word: &str) -> &str {
    ["'s", "’s", "'S", "’S"].iter().find_map(|ending| word.strip_suffix(ending)).unwrap_or(word)
}

/// One form for all forms of a word: lowercase, with a straight apostrophe, without an English plural.
fn fold(word: &str) -> String {
    let mut folded = bare(word).to_lowercase();
    if folded.contains('’') {
        folded = folded.replace('’', "'");
    }
    let stop = STOP_WORDS.contains(folded.as_str());
    let plural = 3 < folded.len()
        && folded.ends_with('s')
        && !["ss", "us", "is"].iter().any(|ending| folded.ends_with(ending));
    if plural && !stop {
        folded.pop();
    }
    folded
}

fn kind_of(word: &str, folded: &str) -> Kind {
    if WORD_BYTES_MAX < word.len() || STOP_WORDS.contains(folded) {
        return Kind::Stop;
    }
    if !word.chars().any(char::is_alphabetic) {
        return Kind::Number;
    }
    // A single letter is a list mark or a variable; a single sign of another script may be a word.
    let single = word.len() == 1;
    if single { Kind::Stop } else { Kind::Content }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(sentence: &str) -> Vec<(String, Kind, bool)> {
        let mut words = Vec::new();
        read(sentence, &mut Keys::default(), &mut words);
        let text = |word: &Word| sentence[word.start as usize..word.end as usize].to_owned();
        words.iter().map(|word| (text(word), word.kind, word.joined)).collect()
    }

    #[test]
    fn words_know_what_they_are_and_whether_they_hang_together() {
        let word = |text: &str, kind, joined| (text.to_owned(), kind, joined);
        assert_eq!(
            kinds("The Tide-lock's gate, sector 7 of https://a.example/tide"),
            [
                word("The", Kind::Stop, false),
                word("Tide", Kind::Content, true),
                word("lock", Kind::Content, true),
                word("gate", Kind::Content, true),
                word("sector", Kind::Content, false),
                word("7", Kind::Number, true),
                word("of", Kind::Stop, true),
                word("https", Kind::Stop, true),
                word("a.example", Kind::Stop, false),
                word("tide", Kind::Stop, false),
            ]
        );
    }

    #[test]
    fn all_forms_of_a_word_are_one() {
        for (form, folded) in [
            ("Valves", "valve"),
            ("valve’s", "valve"),
            ("GLASS", "glass"),
            ("Status", "status"),
            ("bus", "bus"),
            ("its", "its"),
        ] {
            assert_eq!(fold(form), folded);
        }
    }

    #[test]
    fn content_words_come_once_and_in_order() {
        assert_eq!(content_of("The heron saw the herons, don’t you see?"), ["heron"]);
        assert_eq!(content_of("Der Reiher und die Schleuse"), ["reiher", "schleuse"]);
    }
}
