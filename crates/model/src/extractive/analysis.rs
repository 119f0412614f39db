//! What a text says, as far as counting shows it: its questions, its key terms, its weightiest sentences.
//!
//! Time and memory are linear in the text but for one sort, whatever the text is.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use super::terms::{self, Span, Term};
use super::words::{self, Keys, Kind, Word};
use super::{markdown, sentences};

pub(super) struct Analysis {
    sentences: Vec<Sentence>,
    keys: Keys,
    pub(super) terms: Vec<Term>,
    /// Sentences by weight, heaviest first; no question, no repetition.
    ranked: Vec<usize>,
}

struct Sentence {
    text: String,
    prose: bool,
    words: Range<usize>,
    question: bool,
    /// 1 for the first sentence of these words, 2 for its first repetition.
    copy: u32,
    score: f64,
    /// Bit n for term n.
    terms: u8,
}

pub(super) fn analyse(text: &str) -> Analysis {
    let mut keys = Keys::default();
    let mut words = Vec::new();
    let mut sentences = read(text, &mut keys, &mut words);
    count_copies(&mut sentences, &words);
    let weights = weigh(&sentences);
    let spans: Vec<Span<'_>> = sentences
        .iter()
        .zip(weights)
        .map(|(sentence, weight)| Span {
            text: &sentence.text,
            words: &words[sentence.words.clone()],
            weight,
            prose: sentence.prose,
        })
        .collect();
    let found = terms::find(&spans, &keys);
    drop(spans);
    score(&mut sentences, &words, &found);
    let ranked = rank(&sentences);
    Analysis { sentences, keys, terms: found.terms, ranked }
}

fn read(text: &str, keys: &mut Keys, words: &mut Vec<Word>) -> Vec<Sentence> {
    let mut found = Vec::new();
    for block in markdown::blocks(text) {
        for sentence in sentences::split(&block.text) {
            let first = words.len();
            words::read(sentence, keys, words);
            found.push(Sentence {
                text: sentence.to_owned(),
                prose: block.prose,
                words: first..words.len(),
                question: sentences::is_question(sentence),
                copy: 1,
                score: 0.0,
                terms: 0,
            });
        }
    }
    found
}

/// Sentences that differ only in numbers and in case are copies.
fn count_copies(sentences: &mut [Sentence], words: &[Word]) {
    let mut seen: HashMap<u64, u32> = HashMap::new();
    for sentence in sentences {
        let mut hasher = DefaultHasher::new();
        for word in &words[sentence.words.clone()] {
            if word.kind != Kind::Number {
                word.key.hash(&mut hasher);
            }
        }
        let copies = seen.entry(hasher.finish()).or_default();
        *copies = copies.saturating_add(1);
        sentence.copy = *copies;
    }
}

/// How much the words of each sentence count: more at the start, in headings and in questions; repetitions soon
/// nothing, or a refrain would drown the text.
fn weigh(sentences: &[Sentence]) -> Vec<f64> {
    let opening = sentences.len().div_ceil(10);
    let weight = |(place, sentence): (usize, &Sentence)| {
        let mut weight = f64::from(sentence.copy).powi(-2);
        if place < opening {
            weight *= 1.2;
        }
        if !sentence.prose || sentence.question {
            weight *= 1.5;
        }
        weight
    };
    sentences.iter().enumerate().map(weight).collect()
}

/// Gives each sentence its terms and its weight: terms first, then what else is frequent, then what the questions
/// share with it; long sentences do not win by length alone.
fn score(sentences: &mut [Sentence], words: &[Word], found: &terms::Found) {
    const LENGTH_MIN: usize = 8;
    let mut asked = vec![false; found.word_weights.len()];
    for sentence in sentences.iter().filter(|sentence| sentence.question) {
        for word in &words[sentence.words.clone()] {
            asked[word.key as usize] |= word.kind == Kind::Content;
        }
    }
    let mut counted_in = vec![usize::MAX; found.word_weights.len()];
    for (place, sentence) in sentences.iter_mut().enumerate() {
        sentence.terms = found.terms_in[place];
        let mut score = (0..found.terms.len())
            .filter(|term| sentence.terms & (1 << term) != 0)
            .map(|term| (2 + found.terms.len() - term) as f64)
            .sum::<f64>();
        let mut content = 0;
        for word in &words[sentence.words.clone()] {
            let key = word.key as usize;
            if word.kind != Kind::Content || counted_in[key] == place {
                continue;
            }
            counted_in[key] = place;
            content += 1;
            score += 0.3 * found.word_weights[key].ln_1p();
            if asked[key] {
                score += 2.0;
            }
        }
        score /= (sentence.words.len().max(LENGTH_MIN) as f64).sqrt();
        if content < 3 {
            score *= 0.5;
        }
        if place < 3 {
            score *= 1.2;
        }
        sentence.score = score;
    }
}

fn rank(sentences: &[Sentence]) -> Vec<usize> {
    let places = |fit: &dyn Fn(&Sentence) -> bool| -> Vec<usize> {
        (0..sentences.len()).filter(|place| fit(&sentences[*place])).collect()
    };
    let mut ranked = places(&|s| s.prose && !s.question && s.copy == 1);
    if ranked.is_empty() {
        ranked = places(&|s| !s.question && s.copy == 1);
    }
    ranked.sort_by(|a, b| sentences[*b].score.total_cmp(&sentences[*a].score).then(a.cmp(b)));
    ranked
}

impl Analysis {
    /// Whether there is anything to say about the text.
    pub(super) fn is_empty(&self) -> bool {
        self.sentences.is_empty()
    }

    /// Every question, in the order of the text, repetitions left out.
    pub(super) fn questions(&self) -> impl Iterator<Item = &str> {
        let questions = self.sentences.iter().filter(|s| s.question && s.copy == 1);
        questions.map(|sentence| sentence.text.as_str())
    }

    /// The `max` weightiest sentences, in the order of the text.
    pub(super) fn top(&self, max: usize) -> Vec<&str> {
        self.in_order(self.ranked.iter().take(max).copied().collect())
    }

    /// At most `max` sentences that together show every key term, if the text does; in its order.
    pub(super) fn evidence(&self, max: usize) -> Vec<&str> {
        let mut chosen: Vec<usize> = self.ranked.first().copied().into_iter().collect();
        let shown = |chosen: &[usize]| {
            chosen.iter().fold(0, |terms, place| terms | self.sentences[*place].terms)
        };
        for term in 0..self.terms.len() {
            let bit = 1 << term;
            if max <= chosen.len() || shown(&chosen) & bit != 0 {
                continue;
            }
            let best = self.ranked.iter().find(|place| self.sentences[**place].terms & bit != 0);
            chosen.extend(best);
        }
        for place in &self.ranked {
            if max <= chosen.len() {
                break;
            }
            if !chosen.contains(place) {
                chosen.push(*place);
            }
        }
        self.in_order(chosen)
    }

    /// How many key terms another text shares with this one.
    pub(super) fn shared_with(&self, other: &str) -> usize {
        let words = words::content_of(other);
        let keys: Vec<u32> = words.iter().filter_map(|word| self.keys.get(word)).collect();
        let shared = |term: &&Term| term.keys.iter().all(|key| keys.contains(key));
        self.terms.iter().filter(shared).count()
    }

    fn in_order(&self, mut places: Vec<usize>) -> Vec<&str> {
        places.sort_unstable();
        places.into_iter().map(|place| self.sentences[place].text.as_str()).collect()
    }
}
