//! Key terms: words, and groups of two or three words that come together again and again.
//!
//! Every order has a last rule by place in the text, so that the same text always gives the same terms.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

use super::words::{Keys, Kind, Word};

pub(super) const TERMS_MAX: usize = 8;
/// Groups that come this often are what a text is about, whatever single words are more frequent.
const GROUP_COUNT_MIN: u32 = 3;
/// So that single words find a place, too.
const GROUPS_MAX: usize = 6;
/// Stands for "no third word".
const NONE: u32 = u32::MAX;

/// A sentence as the terms see it.
pub(super) struct Span<'a> {
    pub(super) text: &'a str,
    pub(super) words: &'a [Word],
    /// How much a word in it counts.
    pub(super) weight: f64,
    pub(super) prose: bool,
}

/// A key term.
#[derive(Debug)]
pub(super) struct Term {
    /// As the text mostly writes it.
    pub(super) text: String,
    pub(super) keys: Vec<u32>,
}

/// What was found, and how much each word weighs.
pub(super) struct Found {
    /// Best first.
    pub(super) terms: Vec<Term>,
    /// By key.
    pub(super) word_weights: Vec<f64>,
    /// For each sentence the terms in it, bit n for term n.
    pub(super) terms_in: Vec<u8>,
}

#[derive(Clone, Copy, Default)]
struct Tally {
    count: u32,
    weight: f64,
    /// The number of the word with which it came first.
    first: usize,
}

impl Tally {
    fn add(&mut self, weight: f64, at: usize) {
        if self.count == 0 {
            self.first = at;
        }
        self.count += 1;
        self.weight += weight;
    }
}

type Group = [u32; 3];

struct Candidate {
    keys: Vec<u32>,
    tally: Tally,
    score: f64,
}

pub(super) fn find(spans: &[Span<'_>], keys: &Keys) -> Found {
    let words = count_words(spans, keys);
    let pairs = count_groups(spans, 2, |group| {
        1 < words[group[0] as usize].count && 1 < words[group[1] as usize].count
    });
    let often = |pair: Group| pairs.get(&pair).is_some_and(|tally| 1 < tally.count);
    let triples = count_groups(spans, 3, |group| {
        often([group[0], group[1], NONE]) && often([group[1], group[2], NONE])
    });
    let chosen = choose(&words, &pairs, &triples);
    let (terms, terms_in) = name(spans, chosen);
    Found { terms, word_weights: words.iter().map(|tally| tally.weight).collect(), terms_in }
}

fn count_words(spans: &[Span<'_>], keys: &Keys) -> Vec<Tally> {
    const CAPITAL: f64 = 1.3;
    let mut tallies = vec![Tally::default(); keys.len()];
    let mut at = 0;
    for span in spans {
        for (place, word) in span.words.iter().enumerate() {
            at += 1;
            if word.kind == Kind::Content {
                // The first word of a sentence is written large whatever it is.
                let named = word.capital && span.prose && 0 < place;
                tallies[word.key as usize].add(span.weight * if named { CAPITAL } else { 1.0 }, at);
            }
        }
    }
    tallies
}

/// The group of `size` words that begins with the first of `words`.
fn group_of(words: &[Word], size: usize) -> Option<Group> {
    let group = words.get(..size)?;
    let together = group[1..].iter().all(|word| word.joined && word.kind != Kind::Stop);
    (group[0].kind == Kind::Content && together)
        .then(|| [group[0].key, group[1].key, group.get(2).map_or(NONE, |word| word.key)])
}

/// Counts groups whose parts are worth it: a text of random words has nearly as many groups as words, and no group
/// comes more often than its parts.
fn count_groups(
    spans: &[Span<'_>],
    size: usize,
    worth: impl Fn(Group) -> bool,
) -> HashMap<Group, Tally> {
    let mut tallies: HashMap<Group, Tally> = HashMap::new();
    let mut at = 0;
    for span in spans {
        for place in 0..span.words.len() {
            at += 1;
            let group = group_of(&span.words[place..], size);
            if let Some(group) = group.filter(|group| worth(*group)) {
                tallies.entry(group).or_default().add(span.weight, at);
            }
        }
    }
    tallies
}

fn choose(
    words: &[Tally],
    pairs: &HashMap<Group, Tally>,
    triples: &HashMap<Group, Tally>,
) -> Vec<Candidate> {
    const PAIR: f64 = 2.0;
    const TRIPLE: f64 = 2.4;
    let candidate =
        |keys: &[u32], tally: Tally, score| Candidate { keys: keys.to_vec(), tally, score };
    let mut frequent = Vec::new();
    let mut rest = Vec::new();
    for (group, tally) in triples {
        let parts = [[group[0], group[1], NONE], [group[1], group[2], NONE]];
        let part = parts.iter().filter_map(|part| pairs.get(part)).map(|part| part.count).max();
        let whole = part.is_some_and(|part| 7 * part <= 10 * tally.count);
        if whole && GROUP_COUNT_MIN <= tally.count {
            frequent.push(candidate(group, *tally, tally.weight * TRIPLE));
        }
    }
    for (group, tally) in pairs.iter().filter(|(_, tally)| 1 < tally.count) {
        let list = if GROUP_COUNT_MIN <= tally.count { &mut frequent } else { &mut rest };
        list.push(candidate(&group[..2], *tally, tally.weight * PAIR));
    }
    let seen = words.iter().enumerate().filter(|(_, tally)| 0 < tally.count);
    rest.extend(seen.map(|(key, tally)| candidate(&[key as u32], *tally, tally.weight)));
    let mut chosen = Vec::new();
    take(&mut chosen, frequent, GROUPS_MAX);
    take(&mut chosen, rest, TERMS_MAX);
    chosen
}

/// Takes the best of `candidates` until there are `max`, but none that a chosen one says already.
fn take(chosen: &mut Vec<Candidate>, mut candidates: Vec<Candidate>, max: usize) {
    candidates.sort_by(|a, b| {
        let by_score = b.score.total_cmp(&a.score);
        // The map gave them in any order; place and length are never the same for two.
        by_score.then(a.tally.first.cmp(&b.tally.first)).then(b.keys.len().cmp(&a.keys.len()))
    });
    for candidate in candidates {
        if max <= chosen.len() {
            return;
        }
        let said = chosen.iter().any(|longer| {
            contains(&longer.keys, &candidate.keys)
                && 2 * candidate.tally.count < 3 * longer.tally.count.max(2)
        });
        if !said {
            chosen.retain(|shorter| {
                !(contains(&candidate.keys, &shorter.keys)
                    && 2 * shorter.tally.count < 3 * candidate.tally.count)
            });
            chosen.push(candidate);
        }
    }
}

fn contains(longer: &[u32], shorter: &[u32]) -> bool {
    shorter.len() < longer.len() && longer.windows(shorter.len()).any(|part| part == shorter)
}

/// How often a way of writing was seen within running text, and at all.
type Writings = BTreeMap<String, (u32, u32)>;

/// Gives each term the text that it mostly has, and each sentence its terms.
fn name(spans: &[Span<'_>], chosen: Vec<Candidate>) -> (Vec<Term>, Vec<u8>) {
    let mut by_first: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (term, candidate) in chosen.iter().enumerate() {
        by_first.entry(candidate.keys[0]).or_default().push(term);
    }
    let mut writings: Vec<Writings> = chosen.iter().map(|_| Writings::new()).collect();
    let mut terms_in = vec![0; spans.len()];
    for (span, found) in spans.iter().zip(&mut terms_in) {
        for (place, word) in span.words.iter().enumerate() {
            let Some(terms) = by_first.get(&word.key) else { continue };
            for term in terms {
                let keys = &chosen[*term].keys;
                let Some(group) = span.words[place..].get(..keys.len()) else { continue };
                let joined = group[1..].iter().all(|word| word.joined);
                if !joined || group.iter().map(|word| &word.key).ne(keys) {
                    continue;
                }
                *found |= 1 << term;
                let text = &span.text[word.start as usize..group[keys.len() - 1].end as usize];
                let (within, all) = writings[*term].entry(text.to_owned()).or_default();
                *within += u32::from(span.prose && 0 < place);
                *all += 1;
            }
        }
    }
    let terms = chosen.into_iter().zip(writings);
    let terms = terms.map(|(candidate, seen)| Term { text: usual(seen), keys: candidate.keys });
    (terms.collect(), terms_in)
}

/// The writing that a reader would choose: the most frequent where sentences do not begin, rather small than large.
fn usual(writings: Writings) -> String {
    let large = |text: &str| text.chars().filter(|c| c.is_uppercase()).count();
    let best = writings.into_iter().min_by_key(|(text, (within, all))| {
        (Reverse(*within), Reverse(*all), large(text), text.len(), text.clone())
    });
    best.map(|(text, _)| text).unwrap_or_default()
}
