//! A tool that returns its arguments.

use futures::future::BoxFuture;

use crate::{Call, Error, Output, Tool};

#[derive(Clone, Copy, Debug)]
pub struct Echo;

impl Tool for Echo {
    fn name(&self) -> &str {
        "echo"
    }

    fn is_idempotent(&self) -> bool {
        true
    }

    fn call<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Output, Error>> {
        Box::pin(std::future::ready(Ok(Output(call.arguments.to_string()))))
    }
}
