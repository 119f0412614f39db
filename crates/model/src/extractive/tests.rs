use std::collections::BTreeSet;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use super::*;
use crate::{Message, MessageRole, complete};

const OUTPUT_BYTES_MAX: usize = 8 * 1_024;

/// Three terms and one question among sentences about nothing.
const PLANTED: &str = "# Notes from the harbour

The morning was grey and the boats stayed in. A blue heron stood on the wall for an hour.
Somebody had painted the shed again, and the paint was still wet.

- The tidal lock opened late because of the wind.
- Two men carried boxes to the office. The copper valve was found open, and nobody knew since when.

```sh
copper --open valve   # what is this?
```

Later the [blue heron](https://birds.example/heron?x=1) came back with a fish. The office closed at noon. Rain fell, and
the tidal lock stayed shut. The foreman wrote a letter about the copper valve and the price of paint. **Why does the tidal
lock depend on the copper valve?** The letter was long. In the evening the blue heron slept near the copper valve.
";

fn request(task: Task, messages: Vec<Message>) -> Request {
    Request {
        task,
        messages,
        idempotency_key: "w-1/1".to_owned(),
        tools: vec![],
        max_output_bytes: OUTPUT_BYTES_MAX,
    }
}

fn user(text: &str) -> Message {
    Message::text(MessageRole::User, text)
}

async fn ask(phase: Phase, messages: Vec<Message>) -> String {
    let task = Task::Phase(phase.as_str().to_owned());
    let completion = complete(&Extractive, &request(task, messages), |_| {}).await.unwrap();
    assert!(completion.text.len() <= OUTPUT_BYTES_MAX, "{} bytes", completion.text.len());
    assert_eq!(completion.usage.calls, 1);
    completion.text
}

/// Runs the six phases as a turn does, each with the answers before it.
async fn chain(text: &str, findings: &[&str]) -> Vec<Value> {
    let mut messages = vec![Message::text(MessageRole::System, "Be brief."), user(text)];
    let mut answers = Vec::new();
    for phase in Phase::ALL {
        let mut sent = messages.clone();
        if phase == Phase::Experience {
            let findings = serde_json::json!({ "findings": findings }).to_string();
            sent.push(Message::text(MessageRole::System, findings));
        }
        let answer = ask(phase, sent).await;
        domain::chain::Output::parse(phase, answer.as_bytes()).unwrap();
        messages.push(Message::text(MessageRole::Assistant, &answer));
        answers.push(serde_json::from_str(&answer).unwrap());
    }
    answers
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect()
}

async fn final_answer(text: &str) -> String {
    chain(text, &[]).await[5]["answer"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn the_answer_names_the_question_and_the_key_terms_of_the_text() {
    let answers = chain(PLANTED, &[]).await;
    let [action, _, intention, observation, understanding, last] = answers.as_slice() else {
        panic!("six answers")
    };
    let question = "Why does the tidal lock depend on the copper valve?";
    assert_eq!(strings(&intention["questions"]), [question]);
    assert!(intention["goal"].as_str().unwrap().contains(question));
    let terms = strings(&observation["terms"]);
    for term in ["blue heron", "tidal lock", "copper valve"] {
        assert!(terms.contains(&term), "{terms:?}");
    }
    assert!(terms.len() <= 8);
    assert!(strings(&observation["sentences"]).iter().any(|text| text.contains("tidal lock")));
    assert!((2..=5).contains(&strings(&action["sentences"]).len()));
    assert_eq!(understanding["decision"], "yield");
    let answer = last["answer"].as_str().unwrap();
    for named in [question, "blue heron", "tidal lock", "copper valve"] {
        assert!(answer.contains(named), "{answer}");
    }
    assert!(!answer.contains("--open") && !answer.contains("https://"), "{answer}");
}

#[tokio::test]
async fn planted_terms_are_found_among_any_filler() {
    const SEED: u64 = 7;
    println!("SEED={SEED}");
    const FILLER: [&str; 12] = [
        "The committee met on Monday and talked about the budget for the coming year.",
        "Nobody in the room remembered who had opened the window.",
        "A train passed in the distance while the lights went out.",
        "They ordered more chairs and a table for the second floor.",
        "The report was printed twice because the first copy was lost.",
        "Everybody agreed that the weather had been better last spring.",
        "The phone rang, but it stopped before anyone could answer.",
        "Some guests left early to catch the last bus home.",
        "The manager thanked the team and closed the meeting at five.",
        "Outside, children played football until it was dark.",
        "The cook prepared soup with bread for all of them.",
        "Line 12 of the list was empty, and so was line 13.",
    ];
    const SUBJECTS: [&str; 8] = [
        "blue heron",
        "tidal lock",
        "copper valve",
        "Zephyr engine",
        "amber ledger",
        "night ferry",
        "glass orchard",
        "quartz relay",
    ];
    const PLANTS: [&str; 4] = [
        "At dusk the {} was seen again.",
        "Without the {} the whole plan would fail.",
        "She asked about the {} and wrote it down.",
        "It turned out that the {} had been moved.",
    ];
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    for round in 0..200 {
        let mut pick = |from: &[&'static str]| from[rng.random_range(0..from.len())];
        let mut sentences: Vec<String> = (0..24).map(|_| pick(&FILLER).to_owned()).collect();
        let mut planted = BTreeSet::new();
        while planted.len() < 3 {
            planted.insert(pick(&SUBJECTS));
        }
        let question = format!("What happens when the {} breaks?", pick(&SUBJECTS));
        let mut inserted = vec![question.clone()];
        for term in &planted {
            inserted.extend((0..3).map(|n| PLANTS[n].replace("{}", term)));
        }
        for sentence in inserted {
            let place = rng.random_range(0..=sentences.len());
            sentences.insert(place, sentence);
        }
        let answers = chain(&sentences.join(" "), &[]).await;
        let answer = answers[5]["answer"].as_str().unwrap();
        assert!(answer.contains(&question), "round {round}: {answer}");
        let terms = strings(&answers[3]["terms"]);
        for term in planted {
            assert!(terms.contains(&term), "round {round}, {term}: {answer}");
            assert!(answer.contains(term), "round {round}, {term}: {answer}");
        }
    }
}

#[tokio::test]
async fn the_same_text_gives_the_same_answer_and_another_text_another() {
    let first = chain(PLANTED, &["The tidal lock is old."]).await;
    for _ in 0..20 {
        assert_eq!(chain(PLANTED, &["The tidal lock is old."]).await, first);
    }
    let other = final_answer(&PLANTED.replace("tidal", "night")).await;
    assert!(other.contains("night lock") && !other.contains("tidal"), "{other}");
    assert_ne!(other, first[5]["answer"].as_str().unwrap());
}

#[tokio::test]
async fn every_answer_says_that_no_language_model_was_used() {
    for (phase, answer) in Phase::ALL.into_iter().zip(chain(PLANTED, &[]).await) {
        assert_eq!(answer["phase"], phase.as_str());
        assert_eq!(answer["model"], "extractive");
        assert_eq!(answer["note"], NOTE);
    }
    for text in [PLANTED, "", "Hello"] {
        assert_eq!(final_answer(text).await.lines().last(), Some(NOTE));
    }
    let plain =
        complete(&Extractive, &request(Task::Answer, vec![user(PLANTED)]), |_| {}).await.unwrap();
    assert_eq!(plain.text, final_answer(PLANTED).await);
}

#[tokio::test]
async fn experience_recalls_the_findings_that_share_a_key_term() {
    let findings = ["The budget was cut.", "Valves: the COPPER valve is from 1912.", "Herons eat."];
    let answers = chain(PLANTED, &findings).await;
    assert_eq!(strings(&answers[1]["recalled"]), [findings[1]]);
    let answer = answers[5]["answer"].as_str().unwrap();
    assert!(answer.contains("from 1912"), "{answer}");
    assert!(strings(&chain(PLANTED, &[]).await[1]["recalled"]).is_empty());
}

#[tokio::test]
async fn the_last_phase_rests_on_what_the_earlier_ones_found() {
    let intention = r#"{"phase":"intention","questions":["Where?"],"goal":"g","new":1}"#;
    let observation = r#"{"phase":"observation","terms":["quay"],"sentences":["At the quay."]}"#;
    let earlier = ["no json", r#"{"phase":"dream"}"#, intention, observation];
    let earlier = earlier.map(|json| Message::text(MessageRole::Assistant, json));
    let messages = [vec![user(PLANTED)], earlier.to_vec()].concat();
    let json: Value = serde_json::from_str(&ask(Phase::Yield, messages).await).unwrap();
    let expected =
        format!("Question: Where?\nKey terms: quay\nFrom the text:\n- At the quay.\n{NOTE}");
    assert_eq!(json["answer"], expected);
}

#[tokio::test]
async fn nearly_no_text_gets_a_sensible_answer() {
    for (text, contained) in [
        ("", "Nothing was found"),
        ("  \n\t ", "Nothing was found"),
        ("???", "Nothing was found"),
        ("Hello", "Key terms: Hello"),
        ("Why?", "Question: Why?"),
        ("The and of.", "- The and of."),
        ("# Only a title", "title"),
        ("```\nonly code\n```", "Nothing was found"),
        ("青い鷺。水門はなぜ？", "Question: 水門はなぜ？"),
        ("Warum ist die Schleuse zu? Die Schleuse klemmt.", "Schleuse"),
    ] {
        let answer = final_answer(text).await;
        assert!(answer.contains(contained), "{text:?}: {answer}");
    }
}

const MEGABYTE: usize = 1 << 20;

/// Answers `text` in far more time than an unoptimised build takes on a busy machine, and far less than work that
/// grows as a square.
async fn check_answered(text: &str) {
    let shown: String = text.chars().take(20).collect();
    let answer = ask(Phase::Yield, vec![user(text)]);
    let answer = tokio::time::timeout(Duration::from_secs(60), answer).await;
    let answer = answer.unwrap_or_else(|_| panic!("{shown:?} takes too long"));
    let _: Value = serde_json::from_str(&answer).unwrap();
}

#[tokio::test]
async fn a_megabyte_of_the_same_is_answered_within_bounds() {
    for piece in
        ["a", "?", "a? ", "[](", "<a", "```\n~~~x\n", "\n", ".)", "\u{301}", "# a\n", "é \"\\"]
    {
        check_answered(&piece.repeat(MEGABYTE / piece.len())).await;
    }
}

#[tokio::test]
async fn a_megabyte_of_random_text_is_answered_within_bounds() {
    const SEED: u64 = 11;
    println!("SEED={SEED}");
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let unicode = std::iter::repeat_with(|| rng.random::<char>());
    check_answered(&unicode.take(MEGABYTE / 4).collect::<String>()).await;
    for pieces in [
        "ab cd ef gh ij kl mn op qr st",
        "a . ? ! \" ' \n",
        "[ ] ( ) < > ! ` * _ ~ \\ | # - \n a",
        "\u{301} \u{200d} a א 1 : . ,",
    ] {
        let pieces: Vec<&str> = pieces.split(' ').collect();
        let spaced = pieces[0].len() == 2 && pieces[0].is_ascii();
        let mut text = String::with_capacity(MEGABYTE);
        while text.len() < MEGABYTE - 8 {
            text.push_str(pieces[rng.random_range(0..pieces.len())]);
            if spaced {
                text.push(' ');
            }
        }
        check_answered(&text).await;
    }
}

#[tokio::test]
async fn a_large_text_is_not_read_on_the_thread_of_the_caller() {
    let asked = |bytes: usize| {
        let text = "The heron waits. ".repeat(bytes / 17);
        request(Task::Phase("observation".to_owned()), vec![user(&text)])
    };
    let large = asked(MEGABYTE);
    let mut answer = std::pin::pin!(complete(&Extractive, &large, |_| {}));
    assert!(futures::poll!(&mut answer).is_pending());
    answer.await.unwrap();
    let small = asked(2_048);
    let mut answer = std::pin::pin!(complete(&Extractive, &small, |_| {}));
    assert!(futures::poll!(&mut answer).is_ready());
}

#[tokio::test]
async fn an_unknown_phase_is_refused_by_name() {
    let task = Task::Phase("dream".to_owned());
    let error = complete(&Extractive, &request(task, vec![user("x")]), |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), domain::ErrorKind::Invalid);
    assert!(error.to_string().contains("dream"), "{error}");
}
