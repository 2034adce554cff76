//! Holds our .proto files against upstream's, field by field, so that neither drifts.
//!
//! Compared: every message, field (number, type, label, oneof, JSON name), enum, value, service and method (with streaming),
//! and which fields hold secrets. Not compared: comments, files, the marks of maturity (`alpha_*`), which never reach the
//! wire. Upstream's files come from the Go modules pinned in `contract/go.mod`, through the ordinary client and its cache;
//! where they cannot be had the tests say `skipped: …`.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

use protox::prost_reflect::{DescriptorPool, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor};

const CSI: &str = "github.com/container-storage-interface/spec";
const KUBELET: &str = "k8s.io/kubelet";

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn ours(files: &[&str]) -> DescriptorPool {
    compile(&here("proto"), files)
}

fn compile(root: &Path, files: &[&str]) -> DescriptorPool {
    let mut compiler = protox::Compiler::new([root]).unwrap();
    compiler.include_imports(true).open_files(files).unwrap();
    compiler.descriptor_pool()
}

fn our_csi() -> DescriptorPool {
    let parts = ["options", "identity", "volume", "controller", "node", "group", "snapshot_metadata"];
    let files = parts.map(|part| format!("csi/v1/{part}.proto"));
    ours(&files.each_ref().map(String::as_str))
}

/// The unpacked directory of a pinned module, or why it cannot be had. Only a wrong checksum is a failure: then somebody
/// serves other bytes than those that were compared.
fn module(path: &str) -> Result<PathBuf, String> {
    let mut go = Command::new("go");
    go.args(["mod", "download", "-json", path]).current_dir(here("contract")).env("GOFLAGS", "-mod=readonly");
    let output = go.output().map_err(|error| format!("go: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(!said.contains("SECURITY ERROR") && !said.contains("checksum mismatch"), "{said}");
    let answer: HashMap<String, serde_json::Value> =
        serde_json::from_slice(&output.stdout).map_err(|_| said.trim().to_owned())?;
    let text = |key| answer.get(key).and_then(serde_json::Value::as_str);
    match text("Dir") {
        Some(directory) => Ok(PathBuf::from(directory)),
        None => Err(text("Error").unwrap_or("no directory in the answer of go").to_owned()),
    }
}

/// One line per fact.
fn facts(pool: &DescriptorPool, package: &str) -> BTreeSet<String> {
    let mut facts = BTreeSet::new();
    for message in pool.all_messages().filter(|message| message.package_name() == package) {
        facts.insert(format!("message {}", message.full_name()));
        facts.extend(message.fields().map(|field| field_fact(pool, &message, &field)));
        facts.extend(message.oneofs().map(|oneof| format!("oneof {}", oneof.full_name())));
    }
    for kind in pool.all_enums().filter(|kind| kind.package_name() == package) {
        facts.extend(enum_facts(&kind));
    }
    for service in pool.services().filter(|service| service.package_name() == package) {
        for method in service.methods() {
            let stream = |yes| if yes { "stream " } else { "" };
            facts.insert(format!(
                "method {}({}{}) -> {}{}",
                method.full_name(),
                stream(method.is_client_streaming()),
                method.input().full_name(),
                stream(method.is_server_streaming()),
                method.output().full_name()
            ));
        }
    }
    facts
}

fn field_fact(pool: &DescriptorPool, message: &MessageDescriptor, field: &FieldDescriptor) -> String {
    let kind = match field.kind() {
        Kind::Message(of) => of.full_name().to_owned(),
        Kind::Enum(of) => of.full_name().to_owned(),
        scalar => format!("{scalar:?}"),
    };
    let secret = pool
        .get_extension_by_name("csi.v1.csi_secret")
        .is_some_and(|mark| field.options().get_extension(&mark).as_bool() == Some(true));
    format!(
        "field {}.{} = {} {kind} {:?} map={} packed={} presence={} oneof={:?} json={} secret={secret}",
        message.full_name(),
        field.name(),
        field.number(),
        field.cardinality(),
        field.is_map(),
        field.is_packed(),
        field.supports_presence(),
        field.containing_oneof().map(|oneof| oneof.name().to_owned()),
        field.json_name(),
    )
}

fn enum_facts(kind: &EnumDescriptor) -> Vec<String> {
    let name = kind.full_name();
    kind.values().map(|value| format!("value {name}.{} = {}", value.name(), value.number())).collect()
}

fn assert_same(ours: &BTreeSet<String>, upstream: &BTreeSet<String>) {
    let only_ours: Vec<_> = ours.difference(upstream).collect();
    let only_upstream: Vec<_> = upstream.difference(ours).collect();
    assert!(
        only_ours.is_empty() && only_upstream.is_empty(),
        "only ours: {only_ours:#?}\nonly upstream: {only_upstream:#?}"
    );
}

#[test]
fn csi_is_upstreams_field_by_field() {
    let directory = match module(CSI) {
        Ok(directory) => directory,
        Err(reason) => return println!("skipped: csi_is_upstreams_field_by_field: {reason}"),
    };
    let upstream = facts(&compile(&directory, &["csi.proto"]), "csi.v1");
    assert!(upstream.len() > 400, "upstream's file was not understood: {} facts", upstream.len());
    assert_same(&facts(&our_csi(), "csi.v1"), &upstream);
}

#[test]
fn plugin_registration_is_upstreams_field_by_field() {
    let directory = match module(KUBELET) {
        Ok(directory) => directory,
        Err(reason) => return println!("skipped: plugin_registration_is_upstreams_field_by_field: {reason}"),
    };
    let upstream = compile(&directory.join("pkg/apis/pluginregistration/v1"), &["api.proto"]);
    let upstream = facts(&upstream, "pluginregistration");
    assert!(upstream.len() > 10, "upstream's file was not understood: {} facts", upstream.len());
    assert_same(&facts(&ours(&["pluginregistration/registration.proto"]), "pluginregistration"), &upstream);
}

/// The comparison itself must see what it is there to see.
#[test]
fn every_kind_of_drift_is_seen() {
    let directory = tempfile::tempdir().unwrap();
    let text = |change: (&str, &str)| {
        let base = "syntax = \"proto3\"; package p; enum E { ZERO = 0; ONE = 1; }
            message M { string a = 1; repeated int64 b = 2; oneof which { bool c = 3; E d = 4; } map<string, M> e = 5; }
            service S { rpc Call(M) returns (stream M) {} }";
        assert!(base.contains(change.0), "{change:?}");
        base.replace(change.0, change.1)
    };
    let read = |name: &str, change| {
        std::fs::write(directory.path().join(name), text(change)).unwrap();
        facts(&compile(directory.path(), &[name]), "p")
    };
    let base = read("base.proto", ("a", "a"));
    for (number, change) in [
        ("string a = 1", "string a = 9"),
        ("string a", "bytes a"),
        ("string a", "optional string a"),
        ("string a", "string renamed"),
        ("repeated int64", "int64"),
        ("int64 b", "int32 b"),
        ("oneof which", "oneof other"),
        ("ONE = 1", "ONE = 2"),
        ("ONE = 1", "UNO = 1"),
        ("map<string, M>", "map<int32, M>"),
        ("stream M", "M"),
        ("Call(M)", "Call(stream M)"),
        ("rpc Call", "rpc Other"),
        ("E d = 4;", ""),
    ]
    .into_iter()
    .enumerate()
    {
        assert_ne!(read(&format!("drift{number}.proto"), change), base, "{change:?}");
    }
}
