//! libFuzzer's entry to [`lamina_fuzz::wire`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lamina_fuzz::wire(bytes));
