//! libFuzzer's entry to [`lamina_fuzz::device`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lamina_fuzz::device(bytes));
