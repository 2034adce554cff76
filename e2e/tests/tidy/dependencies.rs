//! What the crates stand on, as `cargo metadata` resolves it from the lock file.
//!
//! Invariant: only normal dependencies count (what ships), with all that these bring; tests and build scripts may use
//! more.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// What `protocol` may stand on: bytes, crc-fast, thiserror and what these bring.
pub(crate) const PROTOCOL_MAY_USE: &[&str] = &[
    "block-buffer",
    "bytes",
    "crc-fast",
    "crypto-common",
    "digest",
    "generic-array",
    "lamina-protocol",
    "proc-macro2",
    "quote",
    "spin",
    "syn",
    "thiserror",
    "thiserror-impl",
    "typenum",
    "unicode-ident",
    "version_check",
];
/// What `client` must not stand on: interfaces of one kernel, and Kubernetes.
pub(crate) const CLIENT_MUST_NOT_USE: &[&str] = &[
    "fuser",
    "inotify",
    "io-uring",
    "k8s-openapi",
    "kube",
    "kube-client",
    "kube-core",
    "kube-runtime",
    "libublk",
    "linux-raw-sys",
    "nix",
    "procfs",
    "rustix",
];
/// A target without a libc of its own kind: what is portable resolves there without `libc`.
pub(crate) const OTHER_TARGET: &str = "x86_64-pc-windows-msvc";

pub(crate) fn metadata(target: Option<&str>) -> Value {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = Command::new(cargo);
    command.args(["metadata", "--format-version", "1", "--locked"]).current_dir(super::root());
    command.args(target.into_iter().flat_map(|t| ["--filter-platform", t]));
    let out = command.output().unwrap();
    assert!(out.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Names of all that `name` stands on: normal dependencies, and theirs, itself included.
pub(crate) fn stands_on(metadata: &Value, name: &str) -> BTreeSet<String> {
    let list = |v: &Value| v.as_array().cloned().unwrap_or_default();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let names: BTreeMap<String, String> =
        list(&metadata["packages"]).iter().map(|p| (text(&p["id"]), text(&p["name"]))).collect();
    let nodes: BTreeMap<String, Value> =
        list(&metadata["resolve"]["nodes"]).iter().map(|n| (text(&n["id"]), n.clone())).collect();
    let mut open: Vec<String> = names.iter().filter(|(_, n)| *n == name).map(|(id, _)| id.clone()).collect();
    assert_eq!(open.len(), 1, "one package is called {name}");
    let mut seen = BTreeSet::new();
    while let Some(id) = open.pop() {
        if seen.insert(id.clone()) {
            let normal = |d: &&Value| list(&d["dep_kinds"]).iter().any(|k| k["kind"].is_null());
            open.extend(list(&nodes[&id]["deps"]).iter().filter(normal).map(|d| text(&d["pkg"])));
        }
    }
    seen.iter().map(|id| names[id].clone()).collect()
}

/// Normal dependencies in the manifest of `name` that hold on some platforms only.
pub(crate) fn platform_dependencies(metadata: &Value, name: &str) -> Vec<String> {
    let packages = metadata["packages"].as_array().unwrap();
    let package = packages.iter().find(|p| p["name"] == name).unwrap();
    let dependencies = package["dependencies"].as_array().unwrap().iter();
    let only_some = dependencies.filter(|d| d["kind"].is_null() && !d["target"].is_null());
    only_some.map(|d| format!("{name} needs {} on {} only", d["name"], d["target"])).collect()
}
