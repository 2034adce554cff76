//! A new session for an attachment whose present one cannot be used again (PROTOCOL.md R10), asked of the leader.

use crate::leader::{self, Whereabouts};
use lamina_control_api::leader::{LeaderError, Replace, Replaced};
use lamina_csi_api::name::{NodeName, VolumeHandle};
use lamina_protocol::ids::{SessionId, VolumeId};

/// Why there is no new session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// This node does not hold the attachment any more, or the volume is going: a new attachment is needed.
    #[error("the volume must be attached anew, delete the pod: {0}")]
    Refused(LeaderError),
    /// Not yet. The same question again gets the same session.
    #[error("the session is not replaced yet: {0}")]
    NotYet(LeaderError),
    /// Nobody leads, as far as it can be seen from here.
    #[error("the session cannot be replaced now: no leader of the operator is known")]
    NobodyLeads,
}

/// Who replaces sessions.
#[tonic::async_trait]
pub trait Sessions: Send + Sync {
    /// The session that takes this one's place in this node's attachment, admitted. Asked again with the same session:
    /// the same answer.
    ///
    /// # Errors
    /// [`SessionError`].
    async fn replace(&self, volume: VolumeHandle, session: u128) -> Result<Replaced, SessionError>;
}

/// The leader of the operator, asked for this node.
pub struct AtLeader {
    /// Where it is.
    pub whereabouts: Whereabouts,
    /// This node.
    pub node: NodeName,
}

#[tonic::async_trait]
impl Sessions for AtLeader {
    async fn replace(&self, volume: VolumeHandle, session: u128) -> Result<Replaced, SessionError> {
        let node = self.node.as_str().to_owned();
        let asked = Replace { volume: VolumeId(volume.id()), session: SessionId(session), node };
        match leader::replace(self.whereabouts.clone(), &asked).await {
            Ok(replaced) => Ok(replaced),
            Err(None) => Err(SessionError::NobodyLeads),
            Err(Some(error)) if error.is_final() => Err(SessionError::Refused(error)),
            Err(Some(error)) => Err(SessionError::NotYet(error)),
        }
    }
}
