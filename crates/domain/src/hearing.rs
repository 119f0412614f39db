//! Whether a node hears its control plane: links may hold for longer than anybody answers over them.

/// How long no replica has answered when a node says that it reaches none.
pub const UNHEARD_MS: u64 = 3_000;

/// Begins as heard: who has not joined yet says so otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Hearing {
    is_heard: bool,
}

impl Default for Hearing {
    fn default() -> Self {
        Self { is_heard: true }
    }
}

impl Hearing {
    /// `silent_ms`: since the last answer of any replica, if there was one. Answers whether it hears one, when that is news.
    pub fn look(&mut self, silent_ms: Option<u64>) -> Option<bool> {
        let is_heard = silent_ms.map_or(self.is_heard, |silent_ms| silent_ms < UNHEARD_MS);
        let before = std::mem::replace(&mut self.is_heard, is_heard);
        (before != is_heard).then_some(is_heard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_news_is_told() {
        let mut hearing = Hearing::default();
        assert_eq!(hearing.look(None), None, "nobody has answered yet");
        assert_eq!(hearing.look(Some(UNHEARD_MS - 1)), None);
        assert_eq!(hearing.look(Some(UNHEARD_MS)), Some(false));
        assert_eq!(hearing.look(Some(60_000)), None);
        assert_eq!(hearing.look(Some(10)), Some(true));
        assert_eq!(hearing.look(Some(20)), None);
    }
}
