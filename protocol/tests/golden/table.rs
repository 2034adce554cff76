//! Golden files as text: one record after the other, each a name, a length and its bytes in rows; rows of zeroes are left
//! out. A change of one field then shows as one changed row in a review.
//!
//! ```text
//! name 88
//!   0000 58000000 01000101 …
//! ```

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

const ROW: usize = 32;

/// The text of these records.
pub(crate) fn to_text(records: &[(String, Vec<u8>)]) -> String {
    let mut text = String::new();
    for (name, bytes) in records {
        writeln!(text, "{name} {}", bytes.len()).expect("a string takes all");
        for (nth, row) in bytes.chunks(ROW).enumerate().filter(|(_, row)| row.iter().any(|byte| *byte != 0)) {
            write!(text, "  {:04x}", nth * ROW).expect("a string takes all");
            for word in row.chunks(4) {
                text.push(' ');
                word.iter().for_each(|byte| write!(text, "{byte:02x}").expect("a string takes all"));
            }
            text.push('\n');
        }
    }
    text
}

/// The records of a golden file. A line that is none is a broken file.
pub(crate) fn from_text(text: &str) -> BTreeMap<String, Vec<u8>> {
    let mut records = BTreeMap::new();
    let mut name = String::new();
    for line in text.lines() {
        match line.strip_prefix("  ") {
            None => {
                let (new, length) = line.rsplit_once(' ').expect("a name and a length");
                name = new.to_owned();
                let fresh = records.insert(name.clone(), vec![0; length.parse().expect("a length")]).is_none();
                assert!(fresh, "{name} stands there twice");
            }
            Some(row) => {
                let (at, words) = row.split_once(' ').expect("an offset and bytes");
                let at = usize::from_str_radix(at, 16).expect("an offset");
                let digits: String = words.split(' ').collect();
                let bytes: &mut Vec<u8> = records.get_mut(&name).expect("a name comes first");
                for (nth, pair) in digits.as_bytes().chunks(2).enumerate() {
                    let pair = std::str::from_utf8(pair).expect("digits");
                    bytes[at + nth] = u8::from_str_radix(pair, 16).expect("two digits");
                }
            }
        }
    }
    records
}

/// The first line that differs, from 1.
pub(crate) fn difference(kept: &str, text: &str) -> Option<usize> {
    let first = kept.lines().zip(text.lines()).position(|(a, b)| a != b);
    let shorter = kept.lines().count().min(text.lines().count());
    (kept != text).then(|| first.unwrap_or(shorter) + 1)
}

/// Fails unless the kept file says the same; with `UPDATE_GOLDEN` set it is written first.
pub(crate) fn check(path: &Path, records: &[(String, Vec<u8>)]) {
    let text = to_text(records);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, &text).expect("the golden file is written");
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    if let Some(line) = difference(&kept, &text) {
        panic!("{} is not what the code writes, from line {line} on; `make golden` writes it anew", path.display());
    }
}
