//! What each phase finds in the text and in what the earlier phases found.

use domain::Phase;
use domain::chain::{Action, Decision, Experience, Intention, Observation, Understanding, Yield};
use serde::Deserialize;

use super::NOTE;
use super::analysis::{Analysis, analyse};
use crate::reply::Found;
use crate::{Message, MessageRole};

/// A quoted sentence, counted as it will stand in JSON. With the budgets of the lists below, no answer is longer than
/// 8 KiB.
const QUOTE_BYTES_MAX: usize = 400;
const QUESTIONS_BYTES_MAX: usize = 3_000;
const EVIDENCE_BYTES_MAX: usize = 2_400;
const RECALLED_BYTES_MAX: usize = 1_200;
const ANSWER_QUESTIONS_BYTES_MAX: usize = 1_200;

const DRAFT_SENTENCES: usize = 3;
const TOP_SENTENCES: usize = 5;
const EVIDENCE_SENTENCES: usize = 6;
const RECALLED_MAX: usize = 5;
/// How many earlier findings are looked at, the newest.
const FINDINGS_MAX: usize = 64;
const FINDING_BYTES_MAX: usize = 4_096;

/// A request, as this model understands it.
#[derive(Debug, Default)]
pub(super) struct Given {
    text: String,
    /// Of earlier works.
    findings: Vec<String>,
    /// Of the earlier phases of this work; of a phase that ran again, the last.
    experience: Option<Experience>,
    intention: Option<Intention>,
    observation: Option<Observation>,
}

#[derive(Deserialize)]
struct Findings {
    findings: Vec<String>,
}

#[derive(Deserialize)]
struct Named {
    phase: Phase,
}

impl Given {
    /// Passes over what it does not understand: instructions are for models that read.
    pub(super) fn read(messages: &[Message]) -> Self {
        let mut given = Self::default();
        for message in messages {
            let text = message.joined();
            match message.role {
                MessageRole::System => {
                    if let Ok(found) = serde_json::from_str::<Findings>(&text) {
                        given.findings = found.findings;
                    }
                }
                MessageRole::User => given.text = text,
                MessageRole::Assistant => given.read_earlier(&text),
                MessageRole::Tool => {}
            }
        }
        given
    }

    fn read_earlier(&mut self, json: &str) {
        let Ok(Named { phase }) = serde_json::from_str(json) else { return };
        match phase {
            Phase::Experience => self.experience = serde_json::from_str(json).ok(),
            Phase::Intention => self.intention = serde_json::from_str(json).ok(),
            Phase::Observation => self.observation = serde_json::from_str(json).ok(),
            // Action's draft is taken from the same text as the evidence and says less.
            Phase::Action | Phase::Understanding | Phase::Yield => {}
        }
    }

    /// How much there is to read.
    pub(super) fn bytes(&self) -> usize {
        let finding = |finding: &String| finding.len().min(FINDING_BYTES_MAX);
        self.text.len() + self.findings.iter().take(FINDINGS_MAX).map(finding).sum::<usize>()
    }

    fn experience(&self) -> Experience {
        self.experience.clone().unwrap_or_else(|| Experience { recalled: vec![] })
    }

    /// What the earlier phases found; reads the text only for what they did not.
    fn intention_and_observation(&self) -> (Intention, Observation) {
        match (&self.intention, &self.observation) {
            (Some(intention), Some(observation)) => (intention.clone(), observation.clone()),
            (wanted, seen) => {
                let analysis = analyse(&self.text);
                (
                    wanted.clone().unwrap_or_else(|| intention(&analysis)),
                    seen.clone().unwrap_or_else(|| observation(&analysis)),
                )
            }
        }
    }
}

pub(super) fn found(phase: Phase, given: &Given) -> Found {
    match phase {
        Phase::Action => Found::Action(action(&analyse(&given.text))),
        Phase::Experience => Found::Experience(experience(given)),
        Phase::Intention => Found::Intention(intention(&analyse(&given.text))),
        Phase::Observation => Found::Observation(observation(&analyse(&given.text))),
        Phase::Understanding => {
            let (intention, observation) = given.intention_and_observation();
            Found::Understanding(understanding(&intention, &observation))
        }
        Phase::Yield => Found::Yield(Yield { answer: answer(given) }),
    }
}

fn action(analysis: &Analysis) -> Action {
    if analysis.is_empty() {
        return Action { draft: "The text has no words.".to_owned(), sentences: vec![] };
    }
    let sentences = quotes(analysis.top(TOP_SENTENCES), EVIDENCE_BYTES_MAX);
    let mut draft = quotes(analysis.top(DRAFT_SENTENCES), EVIDENCE_BYTES_MAX);
    if draft.is_empty() {
        draft = quotes(analysis.questions().take(1), QUOTE_BYTES_MAX);
    }
    Action { draft: draft.join(" "), sentences }
}

fn experience(given: &Given) -> Experience {
    if given.findings.is_empty() {
        return Experience { recalled: vec![] };
    }
    let analysis = analyse(&given.text);
    let newest = given.findings.len().saturating_sub(FINDINGS_MAX);
    let findings = given.findings[newest..].iter().map(|finding| cut(finding, FINDING_BYTES_MAX));
    let mut shared: Vec<(usize, &str)> = findings
        .map(|finding| (analysis.shared_with(finding), finding))
        .filter(|(terms, _)| 0 < *terms)
        .collect();
    // Of equals the earlier one stays first.
    shared.sort_by_key(|(terms, _)| std::cmp::Reverse(*terms));
    let best = shared.into_iter().take(RECALLED_MAX).map(|(_, finding)| finding);
    Experience { recalled: quotes(best, RECALLED_BYTES_MAX) }
}

fn intention(analysis: &Analysis) -> Intention {
    let questions = quotes(analysis.questions(), QUESTIONS_BYTES_MAX);
    let goal = match (questions.as_slice(), terms(analysis).as_slice()) {
        ([question], _) => format!("The asker wants an answer to: {question}"),
        ([first, others @ ..], _) => {
            format!("The asker wants answers to {} questions, first: {first}", others.len() + 1)
        }
        ([], []) => "The text asks nothing and names nothing.".to_owned(),
        ([], terms) => {
            let about = terms.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
            format!("The asker wants to know what the text says about {about}.")
        }
    };
    Intention { questions, goal }
}

fn observation(analysis: &Analysis) -> Observation {
    let sentences = quotes(analysis.evidence(EVIDENCE_SENTENCES), EVIDENCE_BYTES_MAX);
    Observation { terms: terms(analysis), sentences }
}

/// More cycles would find the same again, so the first is the last.
fn understanding(intention: &Intention, observation: &Observation) -> Understanding {
    let questions = match intention.questions.len() {
        0 => "no question is asked".to_owned(),
        1 => "1 question is asked".to_owned(),
        n => format!("{n} questions are asked"),
    };
    let why = format!(
        "{questions}; {} key terms and {} sentences of the text bear on it, and reading it again would find the same",
        observation.terms.len(),
        observation.sentences.len()
    );
    Understanding { decision: Decision::Yield, why }
}

/// The final text: questions, terms, evidence, what is recalled, and last how it was made.
pub(super) fn answer(given: &Given) -> String {
    let (intention, observation) = given.intention_and_observation();
    let mut lines = Vec::new();
    for question in quotes(&intention.questions, ANSWER_QUESTIONS_BYTES_MAX) {
        lines.push(format!("Question: {question}"));
    }
    if intention.questions.is_empty() {
        lines.push("The text asks no question.".to_owned());
    }
    if !observation.terms.is_empty() {
        let terms = quotes(&observation.terms, QUOTE_BYTES_MAX * 2);
        lines.push(format!("Key terms: {}", terms.join(", ")));
    }
    list(&mut lines, "From the text:", quotes(&observation.sentences, EVIDENCE_BYTES_MAX));
    list(&mut lines, "Recalled:", quotes(&given.experience().recalled, RECALLED_BYTES_MAX));
    if observation.terms.is_empty() && observation.sentences.is_empty() {
        lines.push("Nothing was found in it.".to_owned());
    }
    lines.push(NOTE.to_owned());
    lines.join("\n")
}

fn list(lines: &mut Vec<String>, title: &str, items: Vec<String>) {
    if !items.is_empty() {
        lines.push(title.to_owned());
        lines.extend(items.into_iter().map(|item| format!("- {item}")));
    }
}

fn terms(analysis: &Analysis) -> Vec<String> {
    analysis.terms.iter().map(|term| term.text.clone()).collect()
}

/// As many of `texts` as fit, each on one line and cut where it is too long.
fn quotes<T: AsRef<str>>(texts: impl IntoIterator<Item = T>, bytes_max: usize) -> Vec<String> {
    let mut quotes = Vec::new();
    let mut room = bytes_max;
    for text in texts {
        let quote = quote(text.as_ref());
        let Some(left) = room.checked_sub(json_bytes(&quote)) else { break };
        room = left;
        quotes.push(quote);
    }
    quotes
}

fn quote(text: &str) -> String {
    const ELLIPSIS: char = '…';
    let mut room = QUOTE_BYTES_MAX - ELLIPSIS.len_utf8();
    let mut quote = String::new();
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        let Some(left) = room.checked_sub(escaped_bytes(c)) else {
            // Not within a word, if it is not one long word.
            if let Some(space) = quote.rfind(' ').filter(|space| QUOTE_BYTES_MAX / 2 < *space) {
                quote.truncate(space);
            }
            quote.push(ELLIPSIS);
            return quote;
        };
        room = left;
        quote.push(c);
    }
    quote
}

/// The length of `text` in JSON, with its quotation marks and a comma.
fn json_bytes(text: &str) -> usize {
    3 + text.chars().map(escaped_bytes).sum::<usize>()
}

fn escaped_bytes(c: char) -> usize {
    match c {
        '"' | '\\' => 2,
        c => c.len_utf8(),
    }
}

/// At most `bytes_max` bytes of `text`.
fn cut(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}
