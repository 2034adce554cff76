//! What the node service needs of `Volume` objects: maps as they are committed, and the note of the filesystem.
//!
//! The node writes `status.filesystem` and nothing else, under its own field manager and only over what it has read
//! (PROTOCOL.md §2.4: all else of `status` is the leader's).

use lamina_crds::id::Id;
use lamina_crds::volume::Filesystem;
use lamina_csi_api::name::VolumeHandle;
use lamina_protocol::ids::SessionId;
use lamina_protocol::map::VolumeMap;
use tokio::sync::watch;
use tokio::task::AbortHandle;

pub mod kubernetes;

/// Why an object could not be read or changed. The caller reports it and is asked again.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// The API server refused, or cannot be reached.
    #[error("the API server did not answer: {0}")]
    Kube(#[from] Box<kube::Error>),
    /// There is no such volume (any more).
    #[error("there is no volume {0}")]
    Gone(VolumeHandle),
    /// Another node has noted something else meanwhile.
    #[error("status.filesystem is not what it was: somebody else changed it")]
    Changed,
    /// The committed map does not list the session that would note something.
    #[error("the session is not in the volume's committed map: it may note nothing of its filesystem")]
    NotListed,
    /// Others write the object all the time.
    #[error("the object is being changed by others all the time")]
    Contended,
}

/// A volume as its object shows it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// The committed map, if there is one that can be believed.
    pub map: Option<VolumeMap>,
    /// The filesystem that was noted.
    pub filesystem: Option<Filesystem>,
    /// Sessions that were ended although wished for.
    pub ended: Vec<SessionId>,
    /// The wishes to attach, of all nodes.
    pub attachments: Vec<Attachment>,
}

/// A wish to attach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attachment {
    /// Its session.
    pub session: u128,
    /// Those in whose place that one is, oldest first.
    pub replaced: Vec<u128>,
}

impl Seen {
    /// The attachment that was published with this session.
    pub fn attachment(&self, published: u128) -> Option<&Attachment> {
        let named = |a: &&Attachment| a.session == published || a.replaced.contains(&published);
        self.attachments.iter().find(named)
    }
}

/// The committed maps of a volume, followed until this is dropped.
pub struct Followed {
    /// The newest; `None` = none known yet.
    pub maps: watch::Receiver<Option<VolumeMap>>,
    /// What follows it.
    pub task: Option<AbortHandle>,
}

impl Drop for Followed {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Whether the committed map lists the session that a note names.
pub(crate) fn may_note(map: Option<&VolumeMap>, now: Option<&Filesystem>) -> bool {
    let Some(session) = now.and_then(|now| now.session.as_ref()).and_then(Id::value) else { return now.is_none() };
    map.is_some_and(|map| map.session(SessionId(session)).is_some())
}

/// The `Volume` objects.
#[tonic::async_trait]
pub trait VolumeObjects: Send + Sync {
    /// The volume now; `None` = there is no such.
    async fn find(&self, volume: VolumeHandle) -> Result<Option<Seen>, ObjectError>;
    /// Its maps from now on.
    fn follow(&self, volume: VolumeHandle) -> Followed;
    /// Note a filesystem in place of what was noted, exactly, and only while the committed map lists the session that
    /// `now` names.
    async fn note_filesystem(
        &self,
        volume: VolumeHandle,
        was: Option<&Filesystem>,
        now: Option<&Filesystem>,
    ) -> Result<(), ObjectError>;
}
