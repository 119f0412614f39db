//! Long answers in pages of about 1 MiB.

use prost::Message;
use proto::link::read_response::Answer;
use proto::link::{ControlAnswer, Mark, RecoveryPage};

use crate::{PAGE_BYTES_MAX, Recovery};

/// Cuts `items` so that a page is at most 1 MiB, or one item.
fn cut<T: Message>(items: Vec<T>) -> Vec<Vec<T>> {
    let mut pages = Vec::new();
    let (mut page, mut bytes) = (Vec::new(), 0);
    for item in items {
        let len = item.encoded_len();
        if !page.is_empty() && PAGE_BYTES_MAX < bytes + len {
            pages.push(std::mem::take(&mut page));
            bytes = 0;
        }
        bytes += len;
        page.push(item);
    }
    if !page.is_empty() {
        pages.push(page);
    }
    pages
}

/// The owner first, then the mark, the tail, the open works, their agents.
pub(super) fn of_recovery(whole: Recovery) -> Vec<Answer> {
    let Recovery { owner, mark, tail, open, agents, agent_max } = whole;
    let first = RecoveryPage { owner: Some(owner), agent_max, ..RecoveryPage::default() };
    let lsn = mark.lsn;
    let mut marks = cut(mark.heads);
    if marks.is_empty() {
        marks.push(Vec::new());
    }
    let marks = marks.into_iter().map(|heads| Mark { lsn, heads });
    let marks = marks.map(|mark| RecoveryPage { mark: Some(mark), ..RecoveryPage::default() });
    let tails = cut(tail).into_iter().map(|tail| RecoveryPage { tail, ..RecoveryPage::default() });
    let opens = cut(open).into_iter().map(|open| RecoveryPage { open, ..RecoveryPage::default() });
    let agents = cut(agents).into_iter();
    let agents = agents.map(|agents| RecoveryPage { agents, ..RecoveryPage::default() });
    let pages = std::iter::once(first).chain(marks).chain(tails).chain(opens).chain(agents);
    pages.map(Answer::Recovery).collect()
}

/// The leader row first.
pub(super) fn of_control(whole: ControlAnswer) -> Vec<Answer> {
    let ControlAnswer {
        leader,
        cluster_id,
        authorities,
        definitions,
        transitions,
        nodes,
        shards,
        audit,
    } = whole;
    let first = ControlAnswer { leader, cluster_id, authorities, ..ControlAnswer::default() };
    let empty = ControlAnswer::default;
    let definitions = cut(definitions).into_iter();
    let definitions = definitions.map(|definitions| ControlAnswer { definitions, ..empty() });
    let transitions = cut(transitions).into_iter();
    let transitions = transitions.map(|transitions| ControlAnswer { transitions, ..empty() });
    let nodes = cut(nodes).into_iter().map(|nodes| ControlAnswer { nodes, ..empty() });
    let shards = cut(shards).into_iter().map(|shards| ControlAnswer { shards, ..empty() });
    let audit = cut(audit).into_iter().map(|audit| ControlAnswer { audit, ..empty() });
    let rest = definitions.chain(transitions).chain(nodes).chain(shards).chain(audit);
    std::iter::once(first).chain(rest).map(Answer::Control).collect()
}

#[cfg(test)]
mod tests {
    use proto::link::DefinitionRow;

    use super::*;

    #[test]
    fn a_page_is_a_mebibyte_or_one_item() {
        let item = |bytes: usize| DefinitionRow {
            body: vec![0; bytes].into(),
            ..DefinitionRow::default()
        };
        let sizes = |items: &[usize]| {
            let pages = cut(items.iter().map(|bytes| item(*bytes)).collect());
            pages.iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&[]), [0; 0]);
        assert_eq!(sizes(&[10, 10, 10]), [3]);
        assert_eq!(sizes(&[600_000, 600_000, 10]), [1, 2]);
        assert_eq!(sizes(&[3 << 20, 10, 3 << 20]), [1, 1, 1]);
    }
}
