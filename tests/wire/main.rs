//! Our side of foreign protocols against real peers: the store on a real sqld.
//!
//! The promises of a store are those of the crate `store`, word for word; they are taken from there.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

/// Each promise is tested over sqld.
macro_rules! promises {
    ($($promise:ident)*) => {
        mod sqld {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                let Some(doors) = crate::doors::Doors::any().await else { return };
                super::$promise(&doors).await;
                doors.end().await;
            })*
        }
    };
}

#[path = "../../crates/store/tests/store/control.rs"]
mod control;
#[path = "../../crates/store/tests/store/doors.rs"]
mod doors;
#[path = "../../crates/store/tests/store/faulty.rs"]
mod faulty;
#[path = "../../crates/store/tests/store/rows.rs"]
mod rows;
#[path = "../../crates/store/tests/store/suite.rs"]
mod suite;
#[path = "../../crates/store/tests/store/writer.rs"]
mod writer;

mod cluster;
mod faults;
mod fixture;
mod tls;
