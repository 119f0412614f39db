fn main() { tests::codegen::generate("proto".as_ref(), "proto/src/gen".as_ref()).unwrap() }
