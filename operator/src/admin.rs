//! The verbs of people over a directory: make, list, delete, grow, attach, detach.
//!
//! With Kubernetes the API server checks and stores what people apply; here this service does, by the same rules as far
//! as a wrong value could do harm. Invariant: it writes wishes only, and waits for the leader to act on them.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use lamina_crds::volume::{AccessMode, AttachMode, AttachmentPhase, AttachmentWish, Volume, VolumeState, VolumeStatus};
use lamina_crds::{Id, ReplicationPolicy, Size, StorageServer};
use lamina_protocol::ids::VolumeId;
use lamina_protocol::limits::{MAX_COPIES, MAX_GROUPS, MAX_PAGE_BYTES, MIN_PAGE_BYTES};
use serde_json::Value;
use tonic::{Request, Response, Status};

use crate::directory::files::Stored;
use crate::directory::{Directory, FINALIZER, Verdict};
use crate::store::StoreError;
use v1::admin_server::{Admin, AdminServer};

/// Messages and service as generated from `proto/lamina/admin/v1`.
pub mod v1 {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::large_futures)]
    include!(concat!(env!("OUT_DIR"), "/lamina.admin.v1.rs"));
}

/// How long a verb waits for the leader.
const PATIENCE: Duration = Duration::from_secs(30);
/// Smallest and largest volume, as the API's schema has them.
const SIZES: std::ops::RangeInclusive<u64> = 1 << 20..=64 << 40;

/// The verbs.
pub struct Verbs {
    directory: Directory,
    mint: fn() -> u128,
}

mod decide;

type Answer<T> = Result<Response<T>, Status>;

impl Verbs {
    /// Over this directory.
    pub fn new(directory: Directory, mint: fn() -> u128) -> Self {
        Self { directory, mint }
    }

    /// As a tonic service.
    pub fn into_server(self) -> AdminServer<Self> {
        AdminServer::new(self)
    }

    async fn create<K: Stored>(&self, json: &str, finish: impl FnOnce(&mut K)) -> Result<K, Status> {
        let mut object: K = serde_json::from_str(json).map_err(|why| invalid(format!("not a {}: {why}", K::KIND)))?;
        let name = object.name_any();
        check_name(&name)?;
        object.meta_mut().creation_timestamp = Some(Time(Timestamp::now()));
        object.meta_mut().generation = Some(1);
        finish(&mut object);
        let made = object.clone();
        let created = self.directory.change::<K, _>(&name, move |there| {
            if there.is_some() {
                return Verdict::Keep(false);
            }
            *there = Some(object);
            Verdict::Replace(true)
        });
        if created.await.map_err(from_store)? {
            Ok(made)
        } else {
            Err(Status::already_exists(format!("there is a {} {name} already", K::KIND)))
        }
    }

    async fn create_volume(&self, json: &str) -> Result<Volume, Status> {
        let id = VolumeId((self.mint)());
        let asked: Volume = serde_json::from_str(json).map_err(|why| invalid(format!("not a Volume: {why}")))?;
        check_size(&asked.spec.size)?;
        if self.directory.index().policy(&asked.spec.policy).is_none() {
            let policy = &asked.spec.policy;
            return Err(Status::failed_precondition(format!("there is no policy {policy}: make it first")));
        }
        self.directory.index().minted(id);
        let volume = self.create::<Volume>(json, |volume| {
            volume.finalizers_mut().push(FINALIZER.to_owned());
            let status = VolumeStatus { volume_id: Some(Id::of(id.0)), generation: Some(0), ..VolumeStatus::default() };
            volume.status = Some(status);
        });
        let name = volume.await?.name_any();
        // The state is described a moment after the map is committed; people are to see both.
        let shown = |s: &VolumeStatus| s.map.is_some() && s.state.is_some_and(|state| state != VolumeState::Pending);
        let placed = |v: &Volume| v.status.as_ref().is_some_and(shown);
        self.wait(&name, "placing", |v| v.is_none_or(placed)).await?.ok_or_else(|| no_volume(&name))
    }

    /// Waits until `done`, or says in the status's own words why not.
    async fn wait(
        &self,
        name: &str,
        doing: &str,
        done: impl Fn(Option<&Volume>) -> bool,
    ) -> Result<Option<Volume>, Status> {
        let mut version = self.directory.version();
        let until = tokio::time::Instant::now() + PATIENCE;
        loop {
            version.mark_unchanged();
            let volume = self.directory.index().volume(name).cloned();
            if done(volume.as_ref()) {
                return Ok(volume);
            }
            if tokio::time::timeout_at(until, version.changed()).await.is_err() {
                let summary = volume.and_then(|v| v.status?.summary?.message);
                let why = summary.unwrap_or_else(|| "the leader has not acted yet".to_owned());
                return Err(Status::failed_precondition(format!("{doing} volume {name} goes on: {why}")));
            }
        }
    }

    async fn wish<R: Send + 'static>(
        &self,
        name: &str,
        change: impl FnOnce(&mut Volume) -> Result<Option<R>, Status> + Send + 'static,
    ) -> Result<Option<R>, Status> {
        let owned = name.to_owned();
        let changed = self.directory.change::<Volume, _>(name, move |object| {
            let Some(volume) = object.as_mut() else { return Verdict::Keep(Err(no_volume(&owned))) };
            match change(volume) {
                Ok(Some(result)) => {
                    volume.metadata.generation = Some(volume.metadata.generation.unwrap_or(0) + 1);
                    Verdict::Replace(Ok(Some(result)))
                }
                other => Verdict::Keep(other),
            }
        });
        changed.await.map_err(from_store)?
    }

    fn find(&self, kind: &str, name: &str) -> Result<v1::Object, Status> {
        let index = self.directory.index();
        let found = match kind {
            Volume::KIND => index.volume(name).map(object),
            StorageServer::KIND => index.server(name).map(object),
            ReplicationPolicy::KIND => index.policy(name).map(object),
            _ => return Err(no_kind(kind)),
        };
        found.ok_or_else(|| Status::not_found(format!("there is no {kind} {name}")))
    }
}

#[tonic::async_trait]
impl Admin for Verbs {
    async fn create(&self, request: Request<v1::Object>) -> Answer<v1::Object> {
        let v1::Object { kind, json } = request.into_inner();
        let made = match kind.as_str() {
            Volume::KIND => object(&self.create_volume(&json).await?),
            StorageServer::KIND => object(&self.create::<StorageServer>(&json, |_| {}).await?),
            ReplicationPolicy::KIND => {
                check_policy(&json)?;
                object(&self.create::<ReplicationPolicy>(&json, |_| {}).await?)
            }
            _ => return Err(no_kind(&kind)),
        };
        Ok(Response::new(made))
    }

    async fn get(&self, request: Request<v1::Name>) -> Answer<v1::Object> {
        let v1::Name { kind, name } = request.into_inner();
        self.find(&kind, &name).map(Response::new)
    }

    async fn list(&self, request: Request<v1::Kind>) -> Answer<v1::Objects> {
        let index = self.directory.index();
        let objects = match request.get_ref().kind.as_str() {
            Volume::KIND => index.volumes().map(object).collect(),
            StorageServer::KIND => index.servers().map(object).collect(),
            ReplicationPolicy::KIND => index.policies().map(object).collect(),
            kind => return Err(no_kind(kind)),
        };
        Ok(Response::new(v1::Objects { objects }))
    }

    async fn delete(&self, request: Request<v1::Name>) -> Answer<v1::Object> {
        let v1::Name { kind, name } = request.into_inner();
        let before = self.find(&kind, &name)?;
        match kind.as_str() {
            Volume::KIND => {
                self.wish(&name, |volume| {
                    let deletion = &mut volume.metadata.deletion_timestamp;
                    Ok(deletion.is_none().then(|| *deletion = Some(Time(Timestamp::now()))))
                })
                .await?;
                self.wait(&name, "deleting", |v| v.is_none()).await?;
            }
            StorageServer::KIND => self.delete_server(&name).await?,
            _ => remove::<ReplicationPolicy>(&self.directory, &name).await?,
        }
        Ok(Response::new(before))
    }

    async fn expand(&self, request: Request<v1::ExpandRequest>) -> Answer<v1::Object> {
        let v1::ExpandRequest { volume, size } = request.into_inner();
        let size: Size = size.parse().map_err(|why| invalid(format!("{size}: {why}")))?;
        let wanted = check_size(&size)?;
        self.wish(&volume, move |volume| {
            let now = volume.spec.size.bytes().unwrap_or(0);
            if wanted < now {
                return Err(invalid(format!("a volume only grows: it has {}", volume.spec.size)));
            }
            Ok((wanted > now).then(|| volume.spec.size = size))
        })
        .await?;
        let bytes = i64::try_from(wanted).unwrap_or(i64::MAX);
        let grown = |v: &Volume| v.status.as_ref().and_then(|s| s.map.as_ref()).is_some_and(|map| map.size >= bytes);
        let grown = self.wait(&volume, "growing", |v| v.is_none_or(grown)).await?;
        Ok(Response::new(object(&grown.ok_or_else(|| no_volume(&volume))?)))
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachReply> {
        let v1::AttachRequest { volume: name, node, read_only } = request.into_inner();
        check_name(&node)?;
        let mode = if read_only { AttachMode::ReadOnly } else { AttachMode::ReadWrite };
        let session = Id::of((self.mint)());
        let wish = AttachmentWish { node: node.clone(), session, mode, replaced: Vec::new() };
        self.wish(&name, move |volume| wish_to_attach(volume, wish)).await?;
        let at = |v: &Volume| {
            let attachments = v.status.iter().flat_map(|s| &s.attachments);
            attachments
                .filter(|a| a.node == node)
                .find(|a| v.spec.attachments.iter().any(|w| w.session == a.session))
                .cloned()
        };
        let settled =
            |v: &Volume| at(v).is_some_and(|a| matches!(a.phase, AttachmentPhase::Attached | AttachmentPhase::Ended));
        let volume = self.wait(&name, "attaching", |v| v.is_none_or(settled)).await?.ok_or_else(|| no_volume(&name))?;
        let attachment = at(&volume).ok_or_else(|| no_volume(&name))?;
        if attachment.phase == AttachmentPhase::Ended {
            let why = attachment.message.unwrap_or_default();
            return Err(Status::failed_precondition(format!("the session of {node} was ended: {why}")));
        }
        let volume_id = volume.status.and_then(|s| s.volume_id).map(|id| id.0).unwrap_or_default();
        let generation = attachment.generation.unwrap_or(0).unsigned_abs();
        Ok(Response::new(v1::AttachReply { volume_id, session: attachment.session.0, generation }))
    }

    async fn detach(&self, request: Request<v1::DetachRequest>) -> Answer<v1::Object> {
        let v1::DetachRequest { volume: name, node } = request.into_inner();
        let left = node.clone();
        self.wish(&name, move |volume| {
            let before = volume.spec.attachments.len();
            volume.spec.attachments.retain(|wish| wish.node != left);
            Ok((volume.spec.attachments.len() < before).then_some(()))
        })
        .await?;
        let out = |v: &Volume| {
            let status = v.status.as_ref();
            let listed =
                status.and_then(|s| s.map.as_ref()).is_some_and(|map| map.sessions.iter().any(|s| s.node == node));
            let under_way = status.is_some_and(|s| s.proposed.is_some());
            !listed && !under_way
        };
        let volume = self.wait(&name, "detaching", |v| v.is_none_or(out)).await?;
        Ok(Response::new(object(&volume.ok_or_else(|| no_volume(&name))?)))
    }

    async fn force(&self, request: Request<v1::ForceRequest>) -> Answer<v1::Object> {
        self.decide_force(request.into_inner()).await.map(Response::new)
    }

    async fn adopt(&self, request: Request<v1::AdoptRequest>) -> Answer<v1::Object> {
        self.decide_adopt(request.into_inner()).await.map(Response::new)
    }

    async fn copies(&self, request: Request<v1::CopiesRequest>) -> Answer<v1::Object> {
        self.decide_copies(request.into_inner()).await.map(Response::new)
    }
}

impl Verbs {
    async fn delete_server(&self, name: &str) -> Result<(), Status> {
        let copies_of = |server: &StorageServer| server.status.as_ref()?.copies;
        let copies = self.directory.index().server(name).and_then(copies_of).map_or(0, |copies| copies.total);
        if copies > 0 {
            return Err(Status::failed_precondition(format!("{copies} copies of volumes lie on server {name}")));
        }
        remove::<StorageServer>(&self.directory, name).await
    }
}

async fn remove<K: Stored>(directory: &Directory, name: &str) -> Result<(), Status> {
    let removed =
        directory.change::<K, _>(name, |object| if object.is_some() { Verdict::Remove(()) } else { Verdict::Keep(()) });
    removed.await.map_err(from_store)
}

fn wish_to_attach(volume: &mut Volume, wish: AttachmentWish) -> Result<Option<()>, Status> {
    let name = volume.name_any();
    if volume.metadata.deletion_timestamp.is_some() {
        return Err(Status::failed_precondition(format!("volume {name} is being deleted")));
    }
    if let Some(there) = volume.spec.attachments.iter().find(|there| there.node == wish.node) {
        let other = format!("volume {name} is attached to {} as {:?}", there.node, there.mode);
        return if there.mode == wish.mode { Ok(None) } else { Err(Status::already_exists(other)) };
    }
    match (volume.spec.access_mode, volume.spec.attachments.first()) {
        (AccessMode::ReadWriteOnce, Some(holder)) => {
            let holder = &holder.node;
            Err(Status::failed_precondition(format!("volume {name} is attached to {holder}: detach it there first")))
        }
        (AccessMode::ReadOnlyMany, _) if wish.mode == AttachMode::ReadWrite => {
            Err(Status::failed_precondition(format!("volume {name} is ReadOnlyMany: attach it read-only")))
        }
        _ => {
            volume.spec.attachments.push(wish);
            Ok(Some(()))
        }
    }
}

fn object<K: Stored>(of: &K) -> v1::Object {
    let json = serde_json::to_string(of).expect("an object of ours is JSON");
    v1::Object { kind: K::KIND.to_owned(), json }
}

fn invalid(why: String) -> Status {
    Status::invalid_argument(why)
}

fn no_kind(kind: &str) -> Status {
    invalid(format!("there is no kind {kind}"))
}

fn no_volume(name: &str) -> Status {
    Status::not_found(format!("there is no volume {name}"))
}

fn from_store(why: StoreError) -> Status {
    Status::internal(why.to_string())
}

/// Names become file names, so they are as Kubernetes has them.
fn check_name(name: &str) -> Result<(), Status> {
    let fits = (1..=253).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.ends_with(|c: char| c.is_ascii_alphanumeric());
    let why = || invalid(format!("{name:?} is not a name: lower-case letters, digits, '-' and '.', at most 253"));
    if fits { Ok(()) } else { Err(why()) }
}

fn check_size(size: &Size) -> Result<u64, Status> {
    let bytes = size.bytes().map_err(|why| invalid(format!("{size}: {why}")))?;
    if SIZES.contains(&bytes) { Ok(bytes) } else { Err(invalid(format!("a volume has 1Mi to 64Ti, not {size}"))) }
}

fn check_policy(json: &str) -> Result<(), Status> {
    let policy: ReplicationPolicy =
        serde_json::from_str(json).map_err(|why| invalid(format!("not a policy: {why}")))?;
    let spec = &policy.spec;
    let in_range = |n: i32, most: usize| usize::try_from(n).is_ok_and(|n| (1..=most).contains(&n));
    if !in_range(spec.copies, MAX_COPIES) {
        return Err(invalid(format!("a policy has 1 to {MAX_COPIES} copies, not {}", spec.copies)));
    }
    if !in_range(spec.stripe_width, MAX_GROUPS) {
        return Err(invalid(format!("a stripe is 1 to {MAX_GROUPS} groups wide, not {}", spec.stripe_width)));
    }
    let power = |size: &Size, most: u64| {
        size.bytes().ok().filter(|b| b.is_power_of_two() && (u64::from(MIN_PAGE_BYTES)..=most).contains(b))
    };
    let page = power(&spec.page_size, MAX_PAGE_BYTES.into());
    let page = page.ok_or_else(|| invalid(format!("a page is a power of two, 64Ki to 4Mi, not {}", spec.page_size)))?;
    let chunk = power(&spec.chunk, page);
    chunk.ok_or_else(|| invalid(format!("a chunk is a power of two, 64Ki to the page size, not {}", spec.chunk)))?;
    Ok(())
}

/// The value of an object as it came over the wire.
///
/// # Errors
/// `INTERNAL` if the operator sent what is no JSON.
pub fn value(object: &v1::Object) -> Result<Value, Status> {
    serde_json::from_str(&object.json).map_err(|why| Status::internal(format!("not JSON: {why}")))
}
