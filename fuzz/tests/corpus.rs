//! The kept inputs through every target, without libFuzzer: what once broke a decoder breaks no later one.
//!
//! `UPDATE_GOLDEN=1` adds the seeds again: the golden frames, messages and disk records.
#![allow(clippy::unwrap_used)]

use lamina_fuzz::TARGETS;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

#[allow(dead_code)] // Only reads.
#[path = "../../protocol/tests/golden/table.rs"]
mod table;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target)
}

fn golden(path: &str) -> BTreeMap<String, Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    table::from_text(&fs::read_to_string(path).unwrap())
}

/// Kind, place and bytes of one edit of a device.
fn edit(kind: u8, place: u16, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    out.extend_from_slice(&place.to_le_bytes());
    out.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
    out.extend_from_slice(bytes);
    out
}

fn control_seeds() -> Vec<(String, Vec<u8>)> {
    let kind = |name: &str| match name.split(' ').next() {
        Some("request") => 0,
        Some("reply") => 1,
        Some("driver") => 2,
        _ => 3,
    };
    let messages = golden("protocol/tests/golden/control-v1.txt");
    messages.into_iter().map(|(name, bytes)| (name.clone(), [vec![kind(&name)], bytes].concat())).collect()
}

fn device_seeds() -> Vec<(String, Vec<u8>)> {
    let records = golden("storage-node/src/store/tests/golden/disk-v1.txt");
    let transaction = &records["transaction"];
    let meta = u32::from_le_bytes(transaction[44..48].try_into().unwrap()) as usize;
    let catalog = edit(3, 0, &records["catalog"]);
    let slotless = edit(4, 1, &records["header without a slot"][4..]);
    let mut slotted = records["header with a slot"][4..].to_vec();
    slotted[20..24].copy_from_slice(&16u32.to_le_bytes());
    let mut seeds = vec![
        ("anchor".to_owned(), edit(2, 0, &records["anchor"][12..90])),
        ("superblock".to_owned(), edit(1, 0, &records["superblock"][12..116])),
        ("raw".to_owned(), edit(0, 5, &transaction[..meta])),
        ("pages".to_owned(), [catalog.clone(), slotless, edit(4, 2, &slotted)].concat()),
        ("cells".to_owned(), [edit(5, 9, &records["cells"][16..288]), edit(7, 600, b"Bytes")].concat()),
        ("writes".to_owned(), [edit(7, 3, b"bytes"), edit(7, 4, b"aytes"), edit(7, 5, b"bytes")].concat()),
    ];
    // Numbers that count up, at their end: offsets of number, position and sequence number in the anchor.
    for (name, offset) in [("number", 16), ("position", 40), ("sequence", 48)] {
        let last = if name == "position" { !0xfff } else { u64::MAX };
        seeds.push((format!("last-{name}"), edit(2, 2 * (offset - 12), &u64::to_le_bytes(last))));
    }
    let mut last_stack = records["catalog"].clone();
    last_stack[12..16].fill(0xff);
    let put_copy = &transaction[64 + 69 + 5 + 14 + 21 + 17..][..73];
    let mut other_copy = put_copy.to_vec();
    other_copy[1] ^= 1;
    seeds.push(("last-stack".to_owned(), [edit(3, 0, &last_stack), edit(6, 0, &other_copy)].concat()));
    // Each record of the golden transaction alone, behind a catalog that has its stack.
    let data_record = 64 + 69 + 5 + 14 + 21;
    let without_data = [&transaction[64..data_record], &transaction[data_record + 17..meta]].concat();
    seeds.push(("records".to_owned(), [catalog, edit(6, 0, &without_data)].concat()));
    seeds
}

fn write_seeds(target: &str) {
    let seeds = match target {
        "wire" => golden("protocol/tests/golden/wire-v1.txt").into_iter().collect(),
        "control" => control_seeds(),
        _ => device_seeds(),
    };
    fs::create_dir_all(corpus(target)).unwrap();
    for (name, bytes) in seeds {
        fs::write(corpus(target).join(format!("seed-{}", name.replace(' ', "-"))), bytes).unwrap();
    }
}

#[test]
fn no_kept_input_breaks_a_decoder() {
    for (target, run) in TARGETS {
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            write_seeds(target);
        }
        let mut kept: Vec<_> = fs::read_dir(corpus(target)).unwrap().map(|entry| entry.unwrap().path()).collect();
        kept.sort();
        assert!(kept.len() > 5, "only {} inputs are kept for {target}", kept.len());
        for path in kept {
            println!("{}", path.display());
            run(&fs::read(&path).unwrap());
        }
    }
}
