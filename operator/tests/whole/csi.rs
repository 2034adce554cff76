//! The CSI controller service on a real kube-apiserver: each call twice in a row, twice at once in one replica and at once
//! in two, and what it says of a volume in use.

use k8s_openapi::api::core::v1::{Node, PersistentVolume};
use kube::api::{Api, Patch, PatchParams, PostParams};
use lamina_crds::{StorageServer, Volume};
use lamina_csi_api::context::PublishContext;
use lamina_csi_api::v1;
use lamina_csi_api::v1::controller_server::Controller;
use lamina_csi_api::v1::volume_capability::{AccessMode, AccessType, BlockVolume, access_mode::Mode};
use lamina_operator::csi::ControllerService;
use serde_json::json;
use std::collections::HashMap;
use tonic::{Code, Request, Status};

use super::kubernetes::Cluster;

#[derive(Clone, Copy, Debug)]
enum Call {
    Create {
        size: i64,
        policy: &'static str,
        mode: Mode,
    },
    Validate,
    Publish {
        node: &'static str,
        readonly: bool,
    },
    /// Everything that only looks: capabilities, room, the volume, the list.
    Look,
    Expand {
        size: i64,
    },
    Unpublish,
    Delete,
}

const CREATE: Call = Call::Create { size: 16 << 20, policy: "two", mode: Mode::SingleNodeWriter };
const PUBLISH: Call = Call::Publish { node: "n", readonly: false };

/// In this order each finds what it needs.
const CALLS: [Call; 7] =
    [CREATE, Call::Validate, PUBLISH, Call::Look, Call::Expand { size: 32 << 20 }, Call::Unpublish, Call::Delete];

fn capability(mode: Mode) -> v1::VolumeCapability {
    v1::VolumeCapability {
        access_mode: Some(AccessMode { mode: mode as i32 }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    }
}

fn range(required_bytes: i64) -> Option<v1::CapacityRange> {
    Some(v1::CapacityRange { required_bytes, limit_bytes: required_bytes })
}

async fn create(service: &ControllerService, call: Call) -> Result<v1::Volume, Status> {
    let Call::Create { size, policy, mode } = call else { panic!("{call:?}") };
    let request = v1::CreateVolumeRequest {
        name: "pvc-1".into(),
        capacity_range: range(size),
        volume_capabilities: vec![capability(mode)],
        parameters: HashMap::from([("policy".to_owned(), policy.to_owned())]),
        ..Default::default()
    };
    Ok(service.create_volume(Request::new(request)).await?.into_inner().volume.unwrap())
}

/// Makes the call; what of its answer must be the same each time.
async fn make(service: &ControllerService, call: Call, volume_id: &str) -> Result<String, Status> {
    let volume_id = volume_id.to_owned();
    match call {
        Call::Create { .. } => create(service, call).await.map(|volume| volume.volume_id),
        Call::Validate => {
            let volume_capabilities = vec![capability(Mode::SingleNodeWriter)];
            let request =
                v1::ValidateVolumeCapabilitiesRequest { volume_id, volume_capabilities, ..Default::default() };
            let answer = service.validate_volume_capabilities(Request::new(request)).await?.into_inner();
            assert!(answer.confirmed.is_some(), "{}", answer.message);
            Ok(format!("{answer:?}"))
        }
        Call::Publish { node, readonly } => {
            let request = v1::ControllerPublishVolumeRequest {
                volume_id,
                node_id: node.into(),
                volume_capability: Some(capability(Mode::SingleNodeWriter)),
                readonly,
                ..Default::default()
            };
            let answer = service.controller_publish_volume(Request::new(request)).await?.into_inner();
            // The generation is that of some map which admits the session; the session is always the same.
            Ok(PublishContext::parse(&answer.publish_context).unwrap().session.to_string())
        }
        Call::Look => look(service, volume_id).await,
        Call::Expand { size } => {
            let request = v1::ControllerExpandVolumeRequest {
                volume_id,
                capacity_range: Some(v1::CapacityRange { required_bytes: size, limit_bytes: 0 }),
                volume_capability: Some(capability(Mode::SingleNodeWriter)),
                ..Default::default()
            };
            Ok(format!("{:?}", service.controller_expand_volume(Request::new(request)).await?.into_inner()))
        }
        Call::Unpublish => {
            let request = v1::ControllerUnpublishVolumeRequest { volume_id, node_id: "n".into(), ..Default::default() };
            Ok(format!("{:?}", service.controller_unpublish_volume(Request::new(request)).await?.into_inner()))
        }
        Call::Delete => {
            let request = v1::DeleteVolumeRequest { volume_id, ..Default::default() };
            Ok(format!("{:?}", service.delete_volume(Request::new(request)).await?.into_inner()))
        }
    }
}

async fn look(service: &ControllerService, volume_id: String) -> Result<String, Status> {
    let room = v1::GetCapacityRequest {
        parameters: HashMap::from([("policy".to_owned(), "two".to_owned())]),
        ..Default::default()
    };
    service.get_capacity(Request::new(room)).await?;
    let can = service.controller_get_capabilities(Request::new(Default::default())).await?.into_inner();
    let get = v1::ControllerGetVolumeRequest { volume_id: volume_id.clone() };
    let got = service.controller_get_volume(Request::new(get)).await?.into_inner();
    assert_eq!(got.volume.map(|volume| volume.volume_id), Some(volume_id.clone()));
    let all = service.list_volumes(Request::new(Default::default())).await?.into_inner().entries;
    let ids: Vec<_> = all.into_iter().map(|entry| entry.volume.map(|volume| volume.volume_id)).collect();
    assert_eq!(ids, [Some(volume_id)]);
    Ok(format!("{can:?} {:?}", got.status.map(|status| status.published_node_ids)))
}

async fn make_node(cluster: &Cluster) {
    let node: Node = serde_json::from_value(json!({"metadata": {"name": "n"}})).unwrap();
    Api::<Node>::all(cluster.client.clone()).create(&PostParams::default(), &node).await.unwrap();
}

/// At once in two replicas, again, and at once in one.
async fn often(services: &[ControllerService; 2], call: Call, id: &str) {
    let [a, b] = services;
    let (one, two) = tokio::join!(make(a, call, id), make(b, call, id));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one, two, "{call:?} at once in two replicas");
    assert_eq!(make(b, call, id).await.unwrap(), one, "{call:?} again");
    let (again, busy) = tokio::join!(make(a, call, id), make(a, call, id));
    for answer in [&again, &busy] {
        match answer {
            Ok(answer) => assert_eq!(*answer, one, "{call:?} at once in one replica"),
            Err(status) => assert_eq!(status.code(), Code::Aborted, "{call:?}: {status}"),
        }
    }
    assert!(again.is_ok() || busy.is_ok(), "{call:?}: one of two is done");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_controller_call_is_repeated_and_made_twice_at_once_without_effect() {
    let test = "every_controller_call_is_repeated_and_made_twice_at_once_without_effect";
    let Some(cluster) = Cluster::start(test, 2).await else { return };
    make_node(&cluster).await;
    let leader = cluster.replica("a", None);
    let service = || ControllerService::new(cluster.client.clone(), lamina_operator::mint);
    let services = [service(), service()];
    let mut id = String::new();
    for call in CALLS {
        if id.is_empty() {
            // Nothing is there before the first call: two at once make one volume.
            let (one, two) = tokio::join!(create(&services[0], CREATE), create(&services[1], CREATE));
            id = one.unwrap().volume_id;
            assert_eq!(two.unwrap().volume_id, id);
        }
        often(&services, call, &id).await;
        let volumes = cluster.volumes().list(&Default::default()).await.unwrap().items;
        let attached = |sessions: usize| volumes.len() == 1 && volumes[0].spec.attachments.len() == sessions;
        match call {
            Call::Create { .. } | Call::Validate | Call::Unpublish => assert!(attached(0), "{call:?}"),
            Call::Publish { .. } | Call::Look | Call::Expand { .. } => assert!(attached(1), "{call:?}"),
            Call::Delete => assert!(volumes.is_empty()),
        }
    }
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_call_with_other_parameters_is_refused_and_a_volume_in_use_names_its_pv_and_node() {
    let test = "the_same_call_with_other_parameters_is_refused_and_a_volume_in_use_names_its_pv_and_node";
    let Some(cluster) = Cluster::start(test, 2).await else { return };
    make_node(&cluster).await;
    let leader = cluster.replica("a", None);
    let service = ControllerService::new(cluster.client.clone(), lamina_operator::mint);
    let volume = create(&service, CREATE).await.unwrap();
    make(&service, PUBLISH, &volume.volume_id).await.unwrap();
    let other = |size, policy, mode| Call::Create { size, policy, mode };
    for (call, code) in [
        (other(64 << 20, "two", Mode::SingleNodeWriter), Code::AlreadyExists),
        (other(16 << 20, "three", Mode::SingleNodeWriter), Code::AlreadyExists),
        (other(16 << 20, "two", Mode::MultiNodeMultiWriter), Code::AlreadyExists),
        (Call::Publish { node: "n", readonly: true }, Code::AlreadyExists),
        (Call::Publish { node: "gone", readonly: false }, Code::NotFound),
        (Call::Delete, Code::FailedPrecondition),
    ] {
        let status = make(&service, call, &volume.volume_id).await.unwrap_err();
        assert_eq!(status.code(), code, "{call:?}: {status}");
    }
    let name = &cluster.volumes().list(&Default::default()).await.unwrap().items[0].metadata.name.clone().unwrap();
    let refusal = make(&service, Call::Delete, &volume.volume_id).await.unwrap_err();
    let in_use = format!("volume {name} is in use on node n: delete the pods that use it first");
    assert_eq!(refusal.message(), format!("{in_use} (no PersistentVolume names it)"));
    let pv: PersistentVolume = serde_json::from_value(json!({"metadata": {"name": "pv-1"}, "spec": {
        "capacity": {"storage": "16Mi"}, "accessModes": ["ReadWriteOnce"],
        "claimRef": {"namespace": "default", "name": "data"},
        "csi": {"driver": "csi.lamina.dev", "volumeHandle": volume.volume_id},
    }}))
    .unwrap();
    Api::<PersistentVolume>::all(cluster.client.clone()).create(&PostParams::default(), &pv).await.unwrap();
    let refusal = make(&service, Call::Delete, &volume.volume_id).await.unwrap_err();
    assert_eq!(refusal.message(), format!("PersistentVolume pv-1, claim default/data: {in_use}"));
    leader.stop().await;
}

/// Topologies, best first: the last part of a key, and a value.
type Places = &'static [(&'static str, &'static str)];

/// The volume made for a claim whose class, or whose first consumer, allows these places.
async fn made_at(service: &ControllerService, name: &str, places: Places) -> String {
    let topology = |(key, value): &(&str, &str)| v1::Topology {
        segments: HashMap::from([(format!("topology.lamina.dev/{key}"), (*value).to_owned())]),
    };
    let preferred: Vec<_> = places.iter().map(topology).collect();
    let mut requisite = preferred.clone();
    requisite.reverse();
    let request = v1::CreateVolumeRequest {
        name: name.into(),
        capacity_range: range(16 << 20),
        volume_capabilities: vec![capability(Mode::SingleNodeWriter)],
        parameters: HashMap::from([("policy".to_owned(), "two".to_owned())]),
        accessibility_requirements: Some(v1::TopologyRequirement { requisite, preferred }),
        ..Default::default()
    };
    let volume = service.create_volume(Request::new(request)).await.unwrap().into_inner().volume.unwrap();
    assert!(volume.accessible_topology.is_empty(), "every node can attach it");
    volume.volume_id
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_copy_of_each_group_lies_where_the_allowed_topologies_say() {
    let test = "the_first_copy_of_each_group_lies_where_the_allowed_topologies_say";
    let Some(cluster) = Cluster::start(test, 3).await else { return };
    let servers: Api<StorageServer> = Api::all(cluster.client.clone());
    let east = Patch::Merge(json!({"spec": {"zone": "east"}}));
    servers.patch("node-1", &PatchParams::default(), &east).await.unwrap();
    let leader = cluster.replica("a", None);
    let service = ControllerService::new(cluster.client.clone(), lamina_operator::mint);
    let cases: [(&str, Places, usize); 4] = [
        ("one-node", &[("node", "node-2")], 2),
        ("one-zone", &[("zone", "east")], 1),
        ("best-first", &[("node", "node-0"), ("node", "node-2")], 0),
        ("a-node-without-storage-in-a-zone", &[("node", "worker-east")], 1),
    ];
    let worker = json!({"metadata": {"name": "worker-east", "labels": {"topology.kubernetes.io/zone": "east"}}});
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    nodes.create(&PostParams::default(), &serde_json::from_value(worker).unwrap()).await.unwrap();
    for (name, places, server) in cases {
        let id = made_at(&service, name, places).await;
        let volumes = cluster.volumes().list(&Default::default()).await.unwrap().items;
        let is = |v: &&Volume| v.status.as_ref().and_then(|s| s.volume_id.as_ref()).is_some_and(|of| of.0 == id);
        let map = volumes.iter().find(is).unwrap().status.as_ref().unwrap().map.clone().unwrap();
        let first: Vec<_> = map.placements.iter().flat_map(|p| &p.groups).map(|g| &g.members[0].server.0).collect();
        let wanted = servers.get(&format!("node-{server}")).await.unwrap().status.unwrap().server_id.unwrap().0;
        assert_eq!(first, [&wanted, &wanted], "{name}: both groups begin on node-{server}");
    }
    leader.stop().await;
}
