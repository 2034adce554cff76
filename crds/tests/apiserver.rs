//! The rules of the schemas, tried on a real kube-apiserver: the good is taken without a warning, the bad is refused in
//! words that say what to do. Skipped by name where etcd and kube-apiserver are not built.
#![allow(clippy::unwrap_used)]

#[path = "apiserver/harness.rs"]
mod harness;

use harness::{Cluster, POLICIES, SERVERS, VOLUMES};
use serde_json::{Value, json};

/// `base` with the fields of `change` on top.
fn with(base: &Value, change: Value) -> Value {
    let mut result = base.clone();
    for (name, value) in change.as_object().unwrap() {
        result[name] = value.clone();
    }
    result
}

fn id(digit: char) -> String {
    std::iter::repeat_n(digit, 32).collect()
}

#[tokio::test]
async fn a_policy_is_taken_only_with_a_shape_that_can_be_and_keeps_it() {
    let Some(cluster) = Cluster::start("a_policy_is_taken_only_with_a_shape_that_can_be").await else { return };
    let good = [
        json!({"copies": 1}),
        json!({"copies": 5, "stripeWidth": 16, "chunk": "64Ki", "pageSize": "4Mi", "topologySpread": "RequireZones"}),
        json!({"copies": 2, "chunk": 65536, "pageSize": 65536}),
        json!({"copies": 2, "rebuildLimit": {"bytesPerSecond": "200Mi", "parallelPages": 4}, "locality": "None"}),
    ];
    for spec in good {
        cluster.try_create(POLICIES, spec.clone()).await.accepted(&spec.to_string());
    }
    let bad = [
        (json!({}), "spec.copies: Required value"),
        (json!({"copies": 0}), "greater than or equal to 1"),
        (json!({"copies": 6}), "less than or equal to 5"),
        (json!({"copies": 2, "stripeWidth": 17}), "less than or equal to 16"),
        (json!({"copies": 2, "pageSize": "3Mi"}), "pageSize must be a power of two from 64Ki to 4Mi"),
        (json!({"copies": 2, "pageSize": "8Mi"}), "pageSize must be a power of two from 64Ki to 4Mi"),
        (json!({"copies": 2, "pageSize": 32768}), "pageSize must be a power of two from 64Ki to 4Mi"),
        (json!({"copies": 2, "pageSize": "64KiB"}), "should match"),
        (json!({"copies": 2, "chunk": "100k"}), "chunk must be a power of two from 64Ki to 4Mi"),
        (json!({"copies": 2, "chunk": "2Mi"}), "chunk must not be larger than pageSize"),
        (json!({"copies": 2, "overcommitPercent": 0}), "greater than or equal to 1"),
        (json!({"copies": 2, "topologySpread": "Rack"}), "supported values"),
        (json!({"copies": 2, "parity": {"data": 4, "parity": 2}}), "parity is not supported yet"),
        (json!({"copies": 2, "rebuildLimit": {"bytesPerSecond": "1k"}}), "from 1Mi to 100Gi"),
    ];
    for (spec, words) in bad {
        cluster.try_create(POLICIES, spec.clone()).await.refused(&spec.to_string(), words);
    }

    let made = cluster.create(POLICIES, "p", json!({"copies": 2})).await.accepted("defaults");
    assert_eq!(made["spec"]["pageSize"], "1Mi");
    let shape = [
        json!({"copies": 3}),
        json!({"stripeWidth": 2}),
        json!({"chunk": "128Ki"}),
        json!({"pageSize": "2Mi"}),
        json!({"topologySpread": "RequireZones"}),
    ];
    for change in shape {
        let answer = cluster.merge(POLICIES, "p", json!({"spec": change})).await;
        answer.refused(&change.to_string(), "make a new ReplicationPolicy instead");
    }
    let same = json!({"spec": {"pageSize": "1024Ki", "rebuildAfterSeconds": 60, "overcommitPercent": 300}});
    cluster.merge(POLICIES, "p", same).await.accepted("the same size in other words, and what may change");
    cluster
        .merge_status(POLICIES, "p", json!({"volumes": 3, "conditions": [condition("Satisfiable")]}))
        .await
        .accepted("status");
}

fn condition(kind: &str) -> Value {
    json!({"type": kind, "status": "True", "reason": "AsWished", "lastTransitionTime": "2026-11-21T12:00:00Z"})
}

#[tokio::test]
async fn a_server_takes_devices_by_stable_paths_and_lets_none_go_that_holds_copies() {
    let Some(cluster) = Cluster::start("a_server_takes_devices_by_stable_paths").await else { return };
    let devices = |devices: Value| json!({ "devices": devices });
    let good = [
        json!({}),
        json!({"zone": "rack-1", "schedulable": false, "drain": true}),
        devices(json!([{"path": "/dev/disk/by-id/nvme-A"}, {"path": "/var/lib/lamina/a", "size": "64Mi"}])),
        devices(json!([{"path": "/dev/mapper/a", "format": true, "atomic4k": false}])),
    ];
    for spec in good {
        cluster.try_create(SERVERS, spec.clone()).await.accepted(&spec.to_string());
    }
    let bad = [
        (devices(json!([{"path": "dev/sda"}])), "should match"),
        (devices(json!([{"path": "/"}])), "at least 2 chars long"),
        (devices(json!([{"path": "/dev/a"}, {"path": "/dev/a"}])), "Duplicate value"),
        (devices(json!([{"path": "/dev/disk/by-id/a", "size": "1Gi"}])), "size is only for files"),
        (devices(json!([{"path": "/var/lib/a"}])), "a file needs a size"),
        (devices(json!([{"path": "/var/lib/a", "size": "63Mi"}])), "from 64Mi to 64Ti"),
        (json!({"zone": "rack 1"}), "should match"),
    ];
    for (spec, words) in bad {
        cluster.try_create(SERVERS, spec.clone()).await.refused(&spec.to_string(), words);
    }

    let two = json!([{"path": "/dev/disk/by-id/a"}, {"path": "/var/lib/b", "size": "1Gi"}]);
    cluster.create(SERVERS, "node-1", devices(two)).await.accepted("two devices");
    let grown = devices(json!([{"path": "/dev/disk/by-id/a"}, {"path": "/var/lib/b", "size": "2Gi"}]));
    cluster.merge(SERVERS, "node-1", json!({ "spec": grown })).await.accepted("grown");
    let shrunk = devices(json!([{"path": "/dev/disk/by-id/a"}, {"path": "/var/lib/b", "size": "1Gi"}]));
    cluster.merge(SERVERS, "node-1", json!({ "spec": shrunk })).await.refused("shrunk", "size can only grow");

    cluster.merge_status(SERVERS, "node-1", server_status()).await.accepted("status");
    let without_b = json!({"spec": devices(json!([{"path": "/dev/disk/by-id/a"}]))});
    let without_a = json!({"spec": devices(json!([{"path": "/var/lib/b", "size": "2Gi"}]))});
    let answer = cluster.merge(SERVERS, "node-1", without_a.clone()).await;
    answer.refused("a holds copies", "a device that holds copies cannot be taken away");
    cluster.merge(SERVERS, "node-1", without_b).await.accepted("b holds none");
    cluster.merge(SERVERS, "node-1", json!({"spec": {"devices": null}})).await.refused("all", "cannot be taken away");

    let printed = cluster.printed(SERVERS).await;
    let shown = |name: &str| printed.iter().find(|(n, _)| n == name).map(|(_, cell)| cell.as_str());
    for (name, cell) in
        [("State", "Ready"), ("Used", "30Gi/100Gi (30%)"), ("Address", "10.0.0.1:7740"), ("Filling", "db 42%")]
    {
        assert_eq!(shown(name), Some(cell), "{printed:?}");
    }
    assert_eq!(cluster.select(SERVERS, "status.state=Ready").await, ["node-1"]);
    assert!(cluster.select(SERVERS, "status.state=Failed").await.is_empty());
}

fn server_status() -> Value {
    json!({
        "state": "Ready", "serverId": id('a'), "clusterId": id('b'), "version": "0.1.0",
        "addresses": {"data": ["10.0.0.1:7740"], "control": ["10.0.0.1:7741"]},
        "devices": [
            {"path": "/dev/disk/by-id/a", "state": "Ready", "id": id('c'), "boot": id('d'), "copies": 2},
            {"path": "/var/lib/b", "state": "Ready", "copies": 0},
        ],
        "copies": {"serving": 2, "total": 2},
        "orphans": [{"copy": id('e'), "volume": id('f'), "stored": 7, "volumeKnown": false}],
        "vetoes": [{"copy": id('e'), "volume": "db", "reason": "LastActiveCopy"}],
        "summary": {"devices": "2/2", "copies": "2/2", "used": "30Gi/100Gi (30%)", "doing": "filling", "filling": "db 42%"},
        "conditions": [condition("Ready")],
    })
}

#[tokio::test]
async fn a_volume_grows_and_keeps_what_its_data_lies_by() {
    let Some(cluster) = Cluster::start("a_volume_grows_and_keeps_what_its_data_lies_by").await else { return };
    let base = json!({"size": "10Gi", "policy": "p"});
    let wish = |node: &str, mode: &str| json!({"node": node, "session": id('1'), "mode": mode});
    let good = [
        base.clone(),
        with(&base, json!({"size": 1_048_576})),
        with(&base, json!({"size": "64Ti", "accessMode": "ReadWriteMany"})),
        with(&base, json!({"near": {"node": "n"}, "forget": [id('2')], "adoptGeneration": 3})),
        with(&base, json!({"attachments": [wish("a", "ReadWrite")]})),
        with(
            &base,
            json!({"accessMode": "ReadOnlyMany", "attachments": [wish("a", "ReadOnly"), wish("b", "ReadOnly")]}),
        ),
    ];
    for spec in good {
        cluster.try_create(VOLUMES, spec.clone()).await.accepted(&spec.to_string());
    }
    let bad = [
        (json!({"size": "10Gi"}), "spec.policy: Required value"),
        (with(&base, json!({"size": "1Ki"})), "size must be a whole number of bytes from 1Mi to 64Ti"),
        (with(&base, json!({"size": "65Ti"})), "size must be a whole number of bytes from 1Mi to 64Ti"),
        (with(&base, json!({"size": -1})), "size must be a whole number of bytes from 1Mi to 64Ti"),
        (with(&base, json!({"size": "10 GB"})), "should match"),
        (with(&base, json!({"size": "1.0000000001Mi"})), "size must be a whole number"),
        (with(&base, json!({"accessMode": "ReadWriteTwice"})), "supported values"),
        (with(&base, json!({"source": {"kind": "Snapshot", "name": "s"}})), "source is not supported yet"),
        (with(&base, json!({"attachments": [{"node": "a", "session": "1"}]})), "spec.attachments[0].session"),
        (with(&base, json!({"attachments": [wish("a", "ReadWrite"), wish("b", "ReadOnly")]})), "to one node only"),
        (with(&base, json!({"attachments": [wish("a", "ReadWrite"), wish("a", "ReadWrite")]})), "Duplicate value"),
        (
            with(&base, json!({"accessMode": "ReadOnlyMany", "attachments": [wish("a", "ReadWrite")]})),
            "can only be attached with mode ReadOnly",
        ),
    ];
    for (spec, words) in bad {
        cluster.try_create(VOLUMES, spec.clone()).await.refused(&spec.to_string(), words);
    }

    cluster.create(VOLUMES, "v", base).await.accepted("created");
    let spec = |change: Value| json!({ "spec": change });
    cluster.merge(VOLUMES, "v", spec(json!({"size": "20Gi"}))).await.accepted("grow");
    cluster.merge(VOLUMES, "v", spec(json!({"size": 21_474_836_480_u64}))).await.accepted("the same in bytes");
    for size in [json!("19Gi"), json!("20G"), json!(4_194_304)] {
        let answer = cluster.merge(VOLUMES, "v", spec(json!({ "size": size }))).await;
        answer.refused(&size.to_string(), "size can only grow");
    }
    let answer = cluster.merge(VOLUMES, "v", spec(json!({"policy": "q"}))).await;
    answer.refused("policy", "policy cannot be changed");
    let answer = cluster.merge(VOLUMES, "v", spec(json!({"accessMode": "ReadWriteMany"}))).await;
    answer.refused("access mode", "accessMode cannot be changed");
}

#[tokio::test]
async fn a_volumes_id_stays_and_its_generation_never_falls() {
    let Some(cluster) = Cluster::start("a_volumes_id_stays_and_its_generation_never_falls").await else { return };
    cluster.create(VOLUMES, "v", json!({"size": "10Gi", "policy": "p"})).await.accepted("created");
    let status = |status: Value| cluster.merge_status(VOLUMES, "v", status);

    let bare_map = status(json!({"map": map(1)})).await;
    bare_map.refused("a map without generation", "map and generation are committed together");
    status(json!({"volumeId": "x"})).await.refused("no id", "status.volumeId");
    status(json!({"volumeId": id('1'), "proposed": proposal(1)})).await.accepted("first intent");
    status(json!({"proposed": null})).await.refused("lost", "the number of a proposal is never used again");

    let commit = json!([
        {"op": "test", "path": "/status/proposed/name", "value": id('7')},
        {"op": "add", "path": "/status/generation", "value": 1},
        {"op": "add", "path": "/status/map", "value": map(1)},
        {"op": "remove", "path": "/status/proposed"},
    ]);
    cluster.patch_status(VOLUMES, "v", commit.clone()).await.accepted("commit");
    let again = cluster.patch_status(VOLUMES, "v", commit).await;
    assert!(!(200..300).contains(&again.code), "a commit without its proposal: {again:?}");

    status(json!({"volumeId": id('2')})).await.refused("another id", "status.volumeId is minted once");
    status(json!({"volumeId": null})).await.refused("no id", "status.volumeId is minted once");
    status(json!({"generation": 5, "map": map(5)})).await.accepted("higher");
    status(json!({"generation": 4, "map": map(4)})).await.refused("lower", "status.generation never falls");
    status(json!({"generation": null, "map": null})).await.refused("gone", "status.generation never falls");
    status(json!({"map": map(6)})).await.refused("newer map", "map and generation are committed together");
    let other = with(&map(5), json!({"volume": id('9')}));
    status(json!({ "map": other })).await.refused("other", "the map of another volume");
    status(json!({"proposed": proposal(8)})).await.accepted("intent");
    status(json!({"proposed": proposal(7)}))
        .await
        .refused("lower intent", "the number of a proposal is never used again");
    status(json!({"proposed": null, "generation": 9, "map": map(9)})).await.accepted("given up, beyond it");
    let whole = json!([{"op": "remove", "path": "/status"}]);
    cluster.patch_status(VOLUMES, "v", whole).await.refused("no status", "status.volumeId is minted once");
    let large = with(&map(10), json!({"placements": [{"groups": vec![group(); 17]}]}));
    status(json!({"generation": 10, "map": large})).await.refused("17 groups", "must have at most 16 items");
}

#[tokio::test]
async fn whoever_applies_a_volume_undoes_nothing_of_the_programs_and_get_tells_how_it_is() {
    let Some(cluster) = Cluster::start("whoever_applies_a_volume_undoes_nothing").await else { return };
    let object = |spec: Value| json!({"apiVersion": "lamina.dev/v1alpha1", "kind": "Volume", "metadata": {"name": "v"}, "spec": spec});
    let by_hand = object(json!({"size": "10Gi", "policy": "p"}));
    cluster.apply(VOLUMES, "v", "kubectl", by_hand.clone()).await.accepted("by hand");
    let full = json!({
        "volumeId": id('1'), "generation": 3, "map": map(3), "state": "Degraded", "observedGeneration": 1,
        "retired": [{"copy": id('4'), "server": id('5'), "generation": 2, "kept": true}], "ended": [id('6')],
        "forced": [{"copy": id('4'), "group": 0, "generation": 3, "was": "Failed", "pagesBehind": 0, "mayBeLost": "some"}],
        "shape": {"copies": 2, "stripeWidth": 1, "chunkBytes": 65536, "pageBytes": 1_048_576, "topologySpread": "PreferZones"},
        "filesystem": {"type": "xfs", "state": "Formatting", "session": id('3')},
        "attachments": [{"session": id('3'), "node": "node-1", "phase": "Attached", "generation": 3}],
        "progress": [{"copy": id('4'), "server": "node-2", "work": "Filling", "pagesLeft": 58, "pagesTotal": 100,
                      "percent": 42, "bytesPerSecond": 1000, "etaSeconds": 60}],
        "summary": {"copies": "1/2", "attached": "node-1", "doing": "filling 1 copy", "filled": "42%",
                    "where": "node-1,node-2~", "filling": "node-2 42% 118Mi/s 3m10s"},
        "conditions": [condition("Placed"), condition("Available")],
    });
    cluster.merge_status(VOLUMES, "v", full.clone()).await.accepted("status");
    let wish = object(json!({"attachments": [{"node": "node-1", "session": id('3')}]}));
    cluster.apply(VOLUMES, "v", "lamina-csi-controller", wish).await.accepted("the plugin's wish");
    let bigger = object(json!({"size": "20Gi", "policy": "p"}));
    let applied = cluster.apply(VOLUMES, "v", "kubectl", bigger).await.accepted("applied again");
    assert_eq!(applied["spec"]["attachments"][0]["session"], json!(id('3')));
    // Every field of the status came back as it was written, so the schema prunes none of them.
    assert_eq!(applied["status"], full_with_defaults(full));
    let typed: lamina_crds::Volume = serde_json::from_value(applied.clone()).unwrap();
    assert_eq!(serde_json::to_value(&typed).unwrap()["status"], applied["status"]);

    let printed = cluster.printed(VOLUMES).await;
    let shown = |name: &str| printed.iter().find(|(n, _)| n == name).map(|(_, cell)| cell.as_str());
    for (name, cell) in [
        ("State", "Degraded"),
        ("Copies", "1/2"),
        ("Size", "20Gi"),
        ("Attached", "node-1"),
        ("Doing", "filling 1 copy"),
        ("Filled", "42%"),
        ("Where", "node-1,node-2~"),
        ("Generation", "3"),
    ] {
        assert_eq!(shown(name), Some(cell), "{printed:?}");
    }
    assert_eq!(cluster.select(VOLUMES, "spec.policy=p,status.state=Degraded").await, ["v"]);
    assert_eq!(cluster.select(VOLUMES, &format!("status.volumeId={}", id('1'))).await, ["v"]);
    assert!(cluster.select(VOLUMES, "spec.policy=q").await.is_empty());
}

/// What the API server adds to it.
fn full_with_defaults(mut status: Value) -> Value {
    for condition in status["conditions"].as_array_mut().unwrap() {
        condition["message"] = json!("");
    }
    status
}

fn proposal(generation: i64) -> Value {
    let copies = json!([{"copy": id('4'), "server": id('5'), "placement": 0, "group": 0, "unsynced": false}]);
    json!({"generation": generation, "name": id('7'), "purpose": "Create", "copies": copies})
}

fn group() -> Value {
    let member = json!({
        "ordinal": 0, "copy": id('4'), "server": id('5'), "boot": id('8'), "state": "Active", "avoid": false,
        "unpromised": false,
    });
    let running = json!({"state": "Running", "authoritative": id('4'), "boot": id('8'), "begun": 1});
    json!({"members": [member], "loss": 0, "settle": running})
}

fn map(generation: i64) -> Value {
    json!({
        "volume": id('1'), "generation": generation, "format": 1, "requiredFeatures": 0, "size": 4096,
        "multiSession": false,
        "servers": [{"id": id('5'), "addresses": ["10.0.0.1:7740"]}],
        "placements": [{"groups": [group()]}],
        "layers": [{"id": id('2'), "size": 4096, "pageBytes": 1_048_576, "scheme": "Replicate", "chunkBytes": 65536, "placement": 0}],
        "sessions": [{"id": id('3'), "node": "node-1", "mode": "ReadWrite", "incarnation": 1, "handled": 0, "standing": "Admitted"}],
        "revoked": [{"session": id('6'), "below": 1, "ranges": [{"start": 0, "length": 4096}]}],
    })
}
