//! Over a directory.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use lamina_control_api::leader::{Leader as _, Refusal, Replace};
use lamina_operator::admin::{self, v1, v1::admin_server::Admin};
use lamina_operator::directory::{Directory, Replacing};
use lamina_operator::runtime::{self, Ended, FailPoint};
use lamina_operator::store::Store;
use lamina_protocol::ids::{ClusterId, Generation, SessionId, VolumeId};
use lamina_protocol::management::{Guard, Status, Step, Written};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::Request;

use super::servers::Servers;
use super::{PATIENCE, options};

pub(crate) const CLUSTER: ClusterId = ClusterId(0xc1);

pub(crate) struct Operator {
    pub(crate) admin: admin::Verbs,
    pub(crate) directory: Directory,
    front: lamina_operator::front::Front,
    metrics: lamina_operator::metrics::Metrics,
    stop: watch::Sender<bool>,
    task: JoinHandle<Ended>,
}

impl Operator {
    pub(crate) async fn start(folder: &TempDir, die_at: Option<FailPoint>) -> Self {
        let (directory, changes) = Directory::open(folder.path()).await.unwrap();
        let (options, stop) = options(CLUSTER, die_at);
        let (front, metrics) = (options.front.clone(), options.metrics.clone());
        front.replace_in(Arc::new(Replacing::new(directory.clone(), lamina_operator::mint)));
        let task = tokio::spawn(runtime::run(options, Arc::new(directory.clone()), changes));
        Self {
            admin: admin::Verbs::new(directory.clone(), lamina_operator::mint),
            directory,
            front,
            metrics,
            stop,
            task,
        }
    }

    pub(crate) async fn create(
        &self,
        kind: &str,
        name: &str,
        spec: Value,
        status: Value,
    ) -> Result<Value, tonic::Status> {
        let object = json!({
            "apiVersion": "lamina.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec, "status": status,
        });
        let object = v1::Object { kind: kind.to_owned(), json: object.to_string() };
        let made = self.admin.create(Request::new(object)).await?.into_inner();
        Ok(serde_json::from_str(&made.json).unwrap())
    }

    pub(crate) async fn add(&self, servers: &Servers) {
        for (n, server) in servers.all.iter().enumerate() {
            let status = json!({"addresses": {"control": [server.address.to_string()]}});
            self.create("StorageServer", &format!("s{n}"), json!({}), status).await.unwrap();
        }
        let spec = json!({"copies": 2, "stripeWidth": 2, "pageSize": "64Ki", "rebuildAfterSeconds": 600});
        self.create("ReplicationPolicy", "two", spec, Value::Null).await.unwrap();
    }

    pub(crate) async fn volume(&self, name: &str) -> Result<Value, tonic::Status> {
        self.create("Volume", name, json!({"size": "16Mi", "policy": "two"}), Value::Null).await
    }

    pub(crate) async fn attach(&self, node: &str) -> Result<v1::AttachReply, tonic::Status> {
        let request = v1::AttachRequest { volume: "v".to_owned(), node: node.to_owned(), read_only: false };
        Ok(self.admin.attach(Request::new(request)).await?.into_inner())
    }

    pub(crate) async fn detach(&self, node: &str) -> Result<v1::Object, tonic::Status> {
        let request = v1::DetachRequest { volume: "v".to_owned(), node: node.to_owned() };
        Ok(self.admin.detach(Request::new(request)).await?.into_inner())
    }

    pub(crate) async fn delete(&self) -> Result<v1::Object, tonic::Status> {
        let name = v1::Name { kind: "Volume".to_owned(), name: "v".to_owned() };
        Ok(self.admin.delete(Request::new(name)).await?.into_inner())
    }

    /// Waits until the volume `v` is so.
    pub(crate) async fn until(&self, what: &str, so: impl Fn(&Value) -> bool) -> Value {
        let mut version = self.directory.version();
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            version.mark_unchanged();
            let volume = self.directory.index().volume("v").map(|v| serde_json::to_value(v).unwrap());
            match volume {
                Some(volume) if so(&volume) => return volume,
                volume if tokio::time::timeout_at(deadline, version.changed()).await.is_err() => {
                    panic!("not {what}: {volume:#?}")
                }
                _ => {}
            }
        }
    }

    pub(crate) async fn stop(self) -> Ended {
        self.stop.send_replace(true);
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap()
    }
}

pub(crate) fn state_is(state: &'static str) -> impl Fn(&Value) -> bool {
    move |volume| volume["status"]["state"] == state
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_lives_its_life_without_kubernetes() {
    let folder = TempDir::new().unwrap();
    let servers = Servers::start(CLUSTER, 3).await;
    let operator = Operator::start(&folder, None).await;
    operator.add(&servers).await;
    let made = operator.volume("v").await.unwrap();
    assert_eq!(made["status"]["generation"], 1);
    let first = operator.attach("n").await.unwrap();
    assert_eq!(operator.attach("n").await.unwrap(), first, "asked again, the same session");
    let other = operator.attach("m").await.unwrap_err();
    assert_eq!(other.code(), tonic::Code::FailedPrecondition, "{other}");
    let id: VolumeId = first.volume_id.parse().unwrap();
    let maps = operator.front.maps(id).unwrap();
    assert_eq!(maps.borrow().as_ref().unwrap().sessions.len(), 1, "drivers are handed the committed map");
    operator.detach("n").await.unwrap();
    let mut maps = operator.front.maps(id).unwrap();
    let empty = maps.wait_for(|map| map.as_ref().is_some_and(|map| map.sessions.is_empty()));
    tokio::time::timeout(PATIENCE, empty).await.unwrap().unwrap();
    operator.delete().await.unwrap();
    assert_eq!(servers.all.iter().map(super::servers::Server::copies).sum::<usize>(), 0, "no copy is forgotten");
    assert_eq!(operator.stop().await, Ended::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_in_use_is_not_deleted_and_says_where() {
    let folder = TempDir::new().unwrap();
    let servers = Servers::start(CLUSTER, 2).await;
    let operator = Operator::start(&folder, None).await;
    operator.add(&servers).await;
    operator.volume("v").await.unwrap();
    operator.attach("worker-7").await.unwrap();
    let deleting = operator.delete();
    let told = operator.until("in use", |v| {
        let conditions = v["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|c| c["type"] == "Deleting" && c["reason"] == "InUse")
    });
    tokio::select! {
        answer = deleting => panic!("it must wait: {answer:?}"),
        told = told => assert!(told.to_string().contains("worker-7"), "{told:#}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn r10_a_node_has_its_session_replaced_once_however_often_it_asks() {
    let folder = TempDir::new().unwrap();
    let servers = Servers::start(CLUSTER, 2).await;
    let operator = Operator::start(&folder, None).await;
    operator.add(&servers).await;
    operator.volume("v").await.unwrap();
    let first = operator.attach("n").await.unwrap();
    let volume: VolumeId = first.volume_id.parse().unwrap();
    let session = first.session.parse().unwrap();
    let ask = |session, node: &str| Replace { volume, session, node: node.to_owned() };
    let asked = [ask(session, "n"), ask(session, "n"), ask(session, "n")];
    let [a, b, c] = asked.map(|asked| operator.front.replace_session(asked));
    let (a, b, c) = tokio::join!(a, b, c);
    let new = a.unwrap();
    assert_eq!((b.unwrap().session, c.unwrap().session), (new.session, new.session), "at once");
    assert_ne!(new.session, session);
    assert_eq!(operator.front.replace_session(ask(session, "n")).await.unwrap().session, new.session, "again");
    let map = operator.front.maps(volume).unwrap().borrow().clone().unwrap();
    assert_eq!(map.sessions.iter().map(|s| (s.id, s.node.as_str())).collect::<Vec<_>>(), [(new.session, "n")]);
    for (other, node) in [(session, "m"), (new.session, "m"), (SessionId(77), "n")] {
        let refused = operator.front.replace_session(ask(other, node)).await.unwrap_err();
        assert!(matches!(refused, Refusal::NotAttached { .. }), "{refused}");
    }
    let third = operator.front.replace_session(ask(new.session, "n")).await.unwrap();
    assert!(third.session != new.session && third.generation > new.generation);
    operator.detach("n").await.unwrap();
    let refused = operator.front.replace_session(ask(third.session, "n")).await.unwrap_err();
    assert!(matches!(refused, Refusal::NotAttached { .. }), "the attachment is gone: {refused}");
    assert_eq!(operator.stop().await, Ended::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_copies_than_servers_is_said_and_done_when_there_are_enough() {
    let folder = TempDir::new().unwrap();
    let servers = Servers::start(CLUSTER, 2).await;
    let operator = Operator::start(&folder, None).await;
    let spec = json!({"copies": 2, "pageSize": "64Ki"});
    operator.create("ReplicationPolicy", "two", spec, Value::Null).await.unwrap();
    let creating = operator.volume("v");
    let refused = operator.until("refused", |v| {
        let conditions = v["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|c| c["type"] == "Placed" && c["status"] == "False" && c["reason"] == "TooFewServers")
    });
    let added = async {
        refused.await;
        for (n, server) in servers.all.iter().enumerate() {
            let status = json!({"addresses": {"control": [server.address.to_string()]}});
            operator.create("StorageServer", &format!("s{n}"), json!({}), status).await.unwrap();
        }
    };
    let (made, ()) = tokio::join!(creating, added);
    assert_eq!(made.unwrap()["status"]["generation"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_wishes_get_one_clear_error() {
    let folder = TempDir::new().unwrap();
    let operator = Operator::start(&folder, None).await;
    let code = |result: Result<Value, tonic::Status>| result.unwrap_err().code();
    let policy = |spec: Value| operator.create("ReplicationPolicy", "p", spec, Value::Null);
    for wrong in [json!({"copies": 0}), json!({"copies": 6}), json!({"copies": 2, "pageSize": "100Ki"})] {
        assert_eq!(code(policy(wrong.clone()).await), tonic::Code::InvalidArgument, "{wrong}");
    }
    policy(json!({"copies": 1})).await.unwrap();
    assert_eq!(code(policy(json!({"copies": 1})).await), tonic::Code::AlreadyExists);
    let volume = |name: &'static str, spec: Value| operator.create("Volume", name, spec, Value::Null);
    assert_eq!(code(volume("v", json!({"size": "1Ki", "policy": "p"})).await), tonic::Code::InvalidArgument);
    assert_eq!(code(volume("v", json!({"size": "1Gi", "policy": "q"})).await), tonic::Code::FailedPrecondition);
    assert_eq!(code(volume("../v", json!({"size": "1Gi", "policy": "p"})).await), tonic::Code::InvalidArgument);
    assert_eq!(operator.attach("n").await.unwrap_err().code(), tonic::Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_is_left_out_and_filled_when_it_is_back() {
    let folder = TempDir::new().unwrap();
    let mut servers = Servers::start(CLUSTER, 4).await;
    let operator = Operator::start(&folder, None).await;
    operator.add(&servers).await;
    operator.volume("v").await.unwrap();
    operator.attach("n").await.unwrap();
    operator.until("healthy", state_is("Healthy")).await;
    let killed = (0..4).find(|n| servers.all[*n].copies() > 0).unwrap();
    servers.kill(killed);
    let left_out = |v: &Value| v["status"]["summary"]["where"].as_str().is_some_and(|text| text.contains('!'));
    let without = operator.until("without it", left_out).await;
    assert_eq!(without["status"]["state"], "Degraded");
    servers.run(killed).await;
    operator.until("healthy again", state_is("Healthy")).await;
    assert_eq!(operator.stop().await, Ended::Stopped);
}

pub(crate) fn condition<'a>(volume: &'a Value, kind: &str) -> &'a Value {
    let conditions = volume["status"]["conditions"].as_array().unwrap();
    conditions.iter().find(|c| c["type"] == kind).unwrap()
}

/// The only volume's one group: (copy, index of its server) as its map has them.
fn members(volume: &Value, servers: &Servers) -> Vec<(String, usize)> {
    let group = &volume["status"]["map"]["placements"][0]["groups"][0];
    let at = |m: &Value| {
        let id = m["server"].as_str().unwrap();
        servers.all.iter().position(|s| s.id.to_string() == id).unwrap()
    };
    group["members"].as_array().unwrap().iter().map(|m| (m["copy"].as_str().unwrap().to_owned(), at(m))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn i8_a_group_without_an_active_member_serves_nothing_until_a_person_forces_a_copy_by_its_name() {
    let folder = TempDir::new().unwrap();
    let mut servers = Servers::start(CLUSTER, 3).await;
    let operator = Operator::start(&folder, None).await;
    operator.add(&servers).await;
    let spec = json!({"copies": 2, "pageSize": "64Ki"});
    operator.create("ReplicationPolicy", "one", spec, Value::Null).await.unwrap();
    let spec = json!({"size": "16Mi", "policy": "one"});
    let volume = operator.create("Volume", "v", spec, Value::Null).await.unwrap();
    let both = members(&volume, &servers);
    let ((good, first), (behind, second)) = (both[0].clone(), both[1].clone());
    servers.kill(second);
    let left_out = |v: &Value| v["status"]["summary"]["where"].as_str().is_some_and(|text| text.contains('!'));
    operator.until("without the second", left_out).await;
    servers.kill(first);
    operator.until("unavailable", state_is("Unavailable")).await;
    servers.run(second).await;
    let how = format!("copy {behind} of group 0 on server s{second}");
    let waits = |v: &Value| condition(v, "Available")["message"].as_str().unwrap().contains(&how);
    let waiting = operator.until("telling how", waits).await;
    assert_eq!(waiting["status"]["state"], "Unavailable", "a copy that is behind serves nothing by itself");

    let generation = waiting["status"]["generation"].as_u64().unwrap();
    let word = |generation, copy: &str, others_are_stopped| {
        let copies = vec![copy.to_owned()];
        Request::new(v1::ForceRequest { volume: "v".to_owned(), generation, copies, others_are_stopped })
    };
    let refused = operator.admin.force(word(generation, &behind, false)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    let refused = operator.admin.force(word(generation - 1, &behind, true)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    operator.admin.force(word(generation, &behind, true)).await.unwrap();
    let healthy = operator.until("healthy on two servers again", state_is("Healthy")).await;
    assert!(members(&healthy, &servers).contains(&(behind.clone(), second)));
    let forced = &healthy["status"]["forced"][0];
    assert_eq!((&forced["copy"], &forced["was"]), (&json!(behind), &json!("Failed")));
    assert!(!forced["mayBeLost"].as_str().unwrap().is_empty());

    servers.run(first).await;
    let orphan = async {
        let mut version = operator.directory.version();
        loop {
            version.mark_unchanged();
            let server = operator.directory.index().server(&format!("s{first}")).cloned().unwrap();
            if server.status.is_some_and(|s| s.orphans.iter().any(|o| o.copy.0 == good)) {
                return;
            }
            version.changed().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, orphan).await.expect("the copy that is left aside is shown as an orphan");
    assert_eq!(servers.all[first].copies(), 1, "and kept");
    let delete = v1::CopiesRequest { volume: "v".to_owned(), copies: vec![good], forget: false };
    operator.admin.copies(Request::new(delete)).await.unwrap();
    assert_eq!(servers.all[first].copies(), 0);
    assert_eq!(operator.stop().await, Ended::Stopped);
}

/// What makes a leader come to a step.
async fn drive(operator: &Operator, servers: &Servers, step: Step) {
    let _ = operator.volume("v").await;
    match step {
        Step::Prepared => {
            let _ = operator.attach("n").await;
            let _ = operator.detach("n").await;
        }
        Step::GivenUp => {
            servers.all[1].deaf.store(true, Ordering::Relaxed);
            let _ = operator.attach("n").await;
        }
        Step::CopiesDeleted => drop(operator.delete().await),
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_killed_at_any_step_is_finished_by_the_next_one() {
    for step in Step::ALL {
        let folder = TempDir::new().unwrap();
        let servers = Servers::start(CLUSTER, 2).await;
        let setup = Operator::start(&folder, None).await;
        setup.add(&servers).await;
        assert_eq!(setup.stop().await, Ended::Stopped);

        let doomed = Operator::start(&folder, Some(FailPoint { step, time: 1 })).await;
        tokio::select! {
            () = drive(&doomed, &servers, step) => {}
            () = tokio::time::sleep(PATIENCE / 2) => {}
            () = died(&doomed.task) => {}
        }
        let ended = tokio::time::timeout(PATIENCE / 4, doomed.task).await;
        assert_eq!(ended.unwrap_or_else(|_| panic!("{step:?} is never come to")).unwrap(), Ended::Died(step));
        let hits =
            doomed.metrics.steps.get_or_create(&lamina_operator::metrics::Named { name: format!("{step:?}") }).get();
        assert_eq!(hits, 1, "{step:?} is hit and counted");

        servers.all[1].deaf.store(false, Ordering::Relaxed);
        let next = Operator::start(&folder, None).await;
        if step == Step::CopiesDeleted {
            let gone = async {
                let mut version = next.directory.version();
                while next.directory.index().volume("v").is_some() {
                    version.changed().await.unwrap();
                }
            };
            tokio::time::timeout(PATIENCE, gone).await.unwrap();
            assert_eq!(servers.all.iter().map(super::servers::Server::copies).sum::<usize>(), 0);
        } else {
            let settled = |v: &Value| state_is("Healthy")(v) && v["status"]["proposed"].is_null();
            next.until(&format!("healthy after {step:?}"), settled).await;
            let retired = |v: &Value| v["status"]["retired"].as_array().is_none_or(Vec::is_empty);
            next.until("without retired copies", retired).await;
            assert_eq!(servers.all.iter().map(super::servers::Server::copies).sum::<usize>(), 4, "{step:?}");
        }
        assert_eq!(next.stop().await, Ended::Stopped);
    }
}

async fn died(task: &JoinHandle<Ended>) {
    while !task.is_finished() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

fn status(generation: u64) -> Status {
    Status { generation: Generation(generation), ..Status::default() }
}

async fn stored_volume(folder: &TempDir) -> (Directory, VolumeId) {
    let (directory, mut changes) = Directory::open(folder.path()).await.unwrap();
    tokio::spawn(async move { while changes.recv().await.is_some() {} });
    let id = VolumeId(7);
    let volume: lamina_crds::Volume = serde_json::from_value(json!({
        "apiVersion": "lamina.dev/v1alpha1", "kind": "Volume", "metadata": {"name": "v"},
        "spec": {"size": "1Gi", "policy": "p"}, "status": {"volumeId": id.to_string(), "generation": 0},
    }))
    .unwrap();
    directory
        .change::<lamina_crds::Volume, _>("v", |there| {
            *there = Some(volume);
            lamina_operator::directory::Verdict::Replace(())
        })
        .await
        .unwrap();
    (directory, id)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_writers_with_one_guard_exactly_one_wins() {
    let folder = TempDir::new().unwrap();
    let (first, id) = stored_volume(&folder).await;
    // Another store over the same folder: nothing is shared but the files, as between two processes.
    let (second, mut changes) = Directory::open(folder.path()).await.unwrap();
    tokio::spawn(async move { while changes.recv().await.is_some() {} });
    let mut wins = [0, 0];
    for round in 0..50 {
        let guard = Guard { generation: Generation(round), proposed: None, retired: Vec::new() };
        let next = status(round + 1);
        let (a, b) = tokio::join!(first.write(id, &guard, &next), second.write(id, &guard, &next));
        assert!(
            matches!((a, b), (Written::Done, Written::Conflict) | (Written::Conflict, Written::Done)),
            "{a:?} {b:?}"
        );
        wins[usize::from(b == Written::Done)] += 1;
    }
    assert_eq!(wins[0] + wins[1], 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_a_crash_cut_short_leaves_the_old_object() {
    let folder = TempDir::new().unwrap();
    let (directory, id) = stored_volume(&folder).await;
    let guard = Guard { generation: Generation(0), proposed: None, retired: Vec::new() };
    assert_eq!(directory.write(id, &guard, &status(1)).await, Written::Done);
    drop(directory);
    // As a process leaves it that dies between writing aside and renaming.
    std::fs::write(folder.path().join("volumes/v.part"), b"apiVersion: lamina.dev/v1alp").unwrap();
    let (after, _changes) = Directory::open(folder.path()).await.unwrap();
    assert_eq!(after.read(id).await.unwrap().unwrap().status.generation, Generation(1));
    let guard = Guard { generation: Generation(1), proposed: None, retired: Vec::new() };
    assert_eq!(after.write(id, &guard, &status(2)).await, Written::Done);
    assert_eq!(after.read(id).await.unwrap().unwrap().status.generation, Generation(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lease_number_rises_with_every_start() {
    let folder = TempDir::new().unwrap();
    let mut numbers = Vec::new();
    for _ in 0..3 {
        let (_directory, mut changes) = Directory::open(folder.path()).await.unwrap();
        changes.recv().await.unwrap();
        let Some(lamina_operator::store::Change::LeaseNumber(number)) = changes.recv().await else { panic!() };
        numbers.push(number);
    }
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
}
