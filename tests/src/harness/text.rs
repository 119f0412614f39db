//! Texts in which something is to be found.

/// Sentences about nothing.
const FILLER: [&str; 12] = [
    "The committee met on Monday and spoke about the budget of the coming year.",
    "Nobody in the room remembered who had opened the window.",
    "A train passed in the distance while the lamps went out.",
    "They ordered more chairs and a table for the second floor.",
    "The report was printed twice because the first copy was lost.",
    "Everybody agreed that last spring had been warmer.",
    "The phone rang, but it stopped before anyone answered.",
    "Some guests left early to catch the last bus home.",
    "The chairman thanked the team and closed the meeting at five.",
    "Outside, children played until it was dark.",
    "The cook prepared soup with bread for all of them.",
    "One line of the list was empty, and so was the next.",
];
/// Where the planted sentences stand among the others.
const PLACES: [usize; 4] = [2, 5, 7, 10];

/// A text with one question and three key terms, and nothing else worth naming.
#[derive(Clone, Debug)]
pub struct Planted {
    pub question: String,
    pub terms: [String; 3],
    pub text: String,
}

impl Planted {
    /// A text of about so many bytes about three things of these names.
    pub fn new(terms: [&str; 3], bytes: usize) -> Self {
        let [first, second, third] = terms;
        let question = format!("Why does the {first} depend on the {second}?");
        let planted = [
            format!("The {first} was repaired beside the {third} in the morning."),
            format!("An inspector measured the {second} and then the {first} again."),
            question.clone(),
            format!("Without the {third} the {second} would not move, said the letter."),
        ];
        let mut sentences: Vec<String> = Vec::new();
        let mut length = 0;
        let mut planted = PLACES.iter().zip(planted).peekable();
        for (number, filler) in FILLER.iter().cycle().enumerate() {
            if let Some((_, sentence)) = planted.next_if(|(place, _)| **place == number) {
                sentences.push(sentence);
            }
            if bytes <= length && planted.peek().is_none() {
                break;
            }
            length += filler.len() + 1;
            sentences.push((*filler).to_owned());
        }
        Self { question, terms: terms.map(str::to_owned), text: sentences.join(" ") }
    }

    /// That an answer names what was planted.
    ///
    /// # Panics
    /// It does not.
    pub fn assert_found_in(&self, answer: &str) {
        assert!(answer.contains(&self.question), "{:?} is not in {answer}", self.question);
        for term in &self.terms {
            assert!(answer.contains(term.as_str()), "{term:?} is not in {answer}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_planted_in_a_text_of_any_length() {
        for bytes in [0, 500, 2_048, 20_000] {
            let planted = Planted::new(["tidal lock", "copper valve", "blue heron"], bytes);
            planted.assert_found_in(&planted.text);
            assert!(bytes <= planted.text.len() && planted.text.len() < bytes + 1_500);
        }
    }
}
