//! The promises of a store: the same for files and for the store role over mutual TLS.

// Helpers of tests fail by panicking, as tests do.
#![allow(clippy::unwrap_used)]

/// Each promise is tested over files and over the store role.
macro_rules! promises {
    ($($promise:ident)*) => {
        mod files {
            $(#[tokio::test]
            async fn $promise() {
                let doors = crate::doors::Doors::file();
                super::$promise(&doors).await;
                doors.end().await;
            })*
        }
        mod remote {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                let doors = crate::doors::Doors::remote().await;
                super::$promise(&doors).await;
                doors.end().await;
            })*
        }
    };
}

mod control;
mod doors;
mod faulty;
mod files;
mod fixture;
mod remote;
mod restore;
mod rows;
mod suite;
mod writer;
