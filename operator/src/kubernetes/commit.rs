//! The guarded patches of a Volume's status (PROTOCOL.md §3 steps 2 and 4, H18): pure.
//!
//! A JSON patch is one atomic step of the API server: all its `test` operations hold, or nothing is changed. A field that
//! must be absent is tested against null; null put into a field takes it away, because none of them is nullable.

use lamina_crds::Id;
use lamina_crds::translate::write_status;
use lamina_crds::volume::VolumeStatus;
use lamina_crds::volume::map::RetiredCopy;
use lamina_protocol::ids::VolumeId;
use lamina_protocol::management::{Guard, Status};
use serde_json::{Value, json};

/// The operations that must hold for a write to happen.
#[must_use]
pub fn tests(volume: VolumeId, guard: &Guard) -> Vec<Value> {
    let test = |path: &str, value: Value| json!({"op": "test", "path": path, "value": value});
    let retired: Vec<_> = guard.retired.iter().map(RetiredCopy::from).collect();
    let mut tests = vec![
        test("/status/volumeId", json!(Id::of(volume.0))),
        test("/status/generation", json!(guard.generation.0)),
        test("/status/retired", json!(retired)),
    ];
    match &guard.proposed {
        None => tests.push(test("/status/proposed", Value::Null)),
        Some((generation, name)) => {
            tests.push(test("/status/proposed/generation", json!(generation.0)));
            tests.push(test("/status/proposed/name", json!(Id::of(*name))));
        }
    }
    tests
}

/// The whole patch of a write.
#[must_use]
pub fn operations(volume: VolumeId, guard: &Guard, next: &Status) -> Value {
    let mut written = VolumeStatus::default();
    write_status(next, &mut written);
    let put = |path: &str, value: Value| json!({"op": "add", "path": path, "value": value});
    let mut operations = tests(volume, guard);
    operations.extend([
        put("/status/generation", json!(written.generation)),
        put("/status/map", json!(written.map)),
        put("/status/proposed", json!(written.proposed)),
        put("/status/retired", json!(written.retired)),
        put("/status/ended", json!(written.ended)),
        put("/status/forced", json!(written.forced)),
    ]);
    Value::Array(operations)
}
