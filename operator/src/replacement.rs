//! A session takes the place of one that its node cannot use again (PROTOCOL.md R10): the wish is changed, no more.
//!
//! The node that holds an attachment asks; the wish to attach gets a new session, and the leader does the rest as for any
//! wish: one generation ends the old session, what it left is settled, a later one admits the new. Invariants: a session
//! id is minted for one wish and never used again; only the present session of the node's own wish is replaced, so the
//! same request twice, or two at once, replace it once; who asks with a session that was replaced before gets the present
//! one.

use kube::ResourceExt;
use lamina_control_api::leader::{Refusal, Replace, Replaced};
use lamina_crds::Id;
use lamina_crds::translate::committed_map;
use lamina_crds::volume::{AttachmentWish, Volume};
use lamina_protocol::ids::SessionId;
use lamina_protocol::map::Standing;

/// As the API's schema bounds `replaced`.
const MOST_REPLACED: usize = 8;

/// Where wishes are changed: the API server, or a directory.
#[tonic::async_trait]
pub trait Sessions: Send + Sync {
    /// Replace a session, and wait until the new one is admitted.
    ///
    /// # Errors
    /// [`Refusal`].
    async fn replace(&self, asked: &Replace) -> Result<Replaced, Refusal>;
}

/// The wishes with `fresh` in place of the asked session; `None` = it was replaced already.
pub(crate) fn wishes(volume: &Volume, asked: &Replace, fresh: u128) -> Result<Option<Vec<AttachmentWish>>, Refusal> {
    if volume.metadata.deletion_timestamp.is_some() {
        return Err(Refusal::BeingDeleted);
    }
    let wish = wish_of(volume, asked)?;
    if wish.session != Id::of(asked.session.0) {
        return Ok(None);
    }
    let mut wishes = volume.spec.attachments.clone();
    for wish in wishes.iter_mut().filter(|wish| wish.node == asked.node) {
        let replaced = std::mem::replace(&mut wish.session, Id::of(fresh));
        if wish.replaced.len() >= MOST_REPLACED {
            wish.replaced.remove(1);
        }
        wish.replaced.push(replaced);
    }
    Ok(Some(wishes))
}

/// The node's wish, if it has or had the asked session.
fn wish_of<'a>(volume: &'a Volume, asked: &Replace) -> Result<&'a AttachmentWish, Refusal> {
    let session = Id::of(asked.session.0);
    let own = |wish: &&AttachmentWish| {
        wish.node == asked.node && (wish.session == session || wish.replaced.contains(&session))
    };
    let refusal = || Refusal::NotAttached { node: asked.node.clone() };
    volume.spec.attachments.iter().find(own).ok_or_else(refusal)
}

/// Whether the session that took the asked one's place is admitted; `None` = not yet.
pub(crate) fn outcome(volume: &Volume, asked: &Replace) -> Option<Result<Replaced, Refusal>> {
    let wish = match wish_of(volume, asked) {
        Ok(wish) => wish,
        Err(refusal) => return Some(Err(refusal)),
    };
    let session = SessionId(wish.session.value().filter(|session| *session != asked.session.0)?);
    let map = committed_map(volume.status.as_ref()?).ok()??;
    let admitted = map.session(session).is_some_and(|listed| listed.standing == Standing::Admitted);
    admitted.then_some(Ok(Replaced { session, generation: map.generation }))
}

/// What a replacement waits for, in plain words.
pub(crate) fn waits_for(volume: Option<&Volume>) -> String {
    let status = volume.and_then(|volume| volume.status.as_ref());
    let message = status.and_then(|status| status.summary.as_ref()?.message.clone());
    let name = volume.map(ResourceExt::name_any).unwrap_or_default();
    message.unwrap_or_else(|| format!("the leader has not admitted the new session of volume {name} yet"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use lamina_protocol::ids::{Generation, VolumeId};
    use serde_json::json;

    fn volume(attachments: &[AttachmentWish]) -> Volume {
        let object = json!({
            "apiVersion": "lamina.dev/v1alpha1", "kind": "Volume", "metadata": {"name": "v"},
            "spec": {"size": "1Gi", "policy": "p", "attachments": attachments},
        });
        serde_json::from_value(object).unwrap()
    }

    fn wish(node: &str, session: u128) -> AttachmentWish {
        let session = Id::of(session);
        AttachmentWish { node: node.into(), session, mode: Default::default(), replaced: Vec::new() }
    }

    fn ask(session: u128, node: &str) -> Replace {
        Replace { volume: VolumeId(7), session: SessionId(session), node: node.into() }
    }

    #[test]
    fn only_the_present_session_of_the_nodes_own_wish_is_replaced_and_only_once() {
        let before = volume(&[wish("a", 1), wish("b", 2)]);
        let after = volume(&wishes(&before, &ask(1, "a"), 9).unwrap().unwrap());
        assert_eq!(after.spec.attachments[0].session, Id::of(9));
        assert_eq!(after.spec.attachments[0].replaced, [Id::of(1)]);
        assert_eq!(after.spec.attachments[1], wish("b", 2), "another node's stays");
        assert_eq!(wishes(&after, &ask(1, "a"), 10), Ok(None), "the same request again");
        for other in [ask(2, "a"), ask(1, "b"), ask(1, "c"), ask(77, "a")] {
            let refused = wishes(&before, &other, 9).unwrap_err();
            assert_eq!(refused, Refusal::NotAttached { node: other.node });
        }
    }

    #[test]
    fn the_session_of_the_attachment_itself_is_never_forgotten() {
        let mut now = volume(&[wish("a", 100)]);
        for session in 100..130 {
            now = volume(&wishes(&now, &ask(session, "a"), session + 1).unwrap().unwrap());
        }
        let kept = &now.spec.attachments[0].replaced;
        assert_eq!((kept.len(), &kept[0], kept.last().unwrap()), (8, &Id::of(100), &Id::of(129)));
        assert_eq!(wishes(&now, &ask(100, "a"), 200), Ok(None));
    }

    #[test]
    fn a_volume_that_is_being_deleted_gets_no_new_session() {
        let mut volume = volume(&[wish("a", 1)]);
        volume.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(k8s_openapi::jiff::Timestamp::now()));
        assert_eq!(wishes(&volume, &ask(1, "a"), 9), Err(Refusal::BeingDeleted));
    }

    #[test]
    fn nobody_hears_of_a_session_that_no_committed_map_admits() {
        let mut wish = wish("a", 9);
        wish.replaced = vec![Id::of(1)];
        let mut volume = volume(&[wish]);
        assert_eq!(outcome(&volume, &ask(1, "a")), None);
        let status = |standing: &str, session: u128| {
            let session = json!({"id": Id::of(session), "node": "a", "mode": "ReadWrite", "incarnation": 0, "handled": 4,
                "standing": standing});
            let settle = if standing == "Held" {
                json!({"state": "Running", "authoritative": Id::of(6), "boot": Id::of(8), "begun": 4})
            } else {
                json!({"state": "None"})
            };
            let member = json!({"ordinal": 0, "copy": Id::of(6), "server": Id::of(5), "boot": Id::of(8),
                "state": "Active", "avoid": false, "unpromised": false});
            json!({"volumeId": Id::of(7), "generation": 4, "map": {
                "volume": Id::of(7), "generation": 4, "format": 1, "requiredFeatures": 0, "size": 1 << 30,
                "multiSession": false, "servers": [{"id": Id::of(5), "addresses": ["127.0.0.1:4000"]}],
                "placements": [{"groups": [{"members": [member], "loss": 0, "settle": settle}]}],
                "layers": [{"id": Id::of(9), "size": 1 << 30, "pageBytes": 1 << 20, "scheme": "Replicate",
                    "chunkBytes": 65536, "placement": 0}],
                "sessions": [session]}})
        };
        for (standing, session) in [("Admitted", 1), ("Held", 9)] {
            volume.status = Some(serde_json::from_value(status(standing, session)).unwrap());
            assert_eq!(outcome(&volume, &ask(1, "a")), None, "{standing} {session}");
        }
        volume.status = Some(serde_json::from_value(status("Admitted", 9)).unwrap());
        let replaced = Replaced { session: SessionId(9), generation: Generation(4) };
        assert_eq!(outcome(&volume, &ask(1, "a")), Some(Ok(replaced)));
        volume.spec.attachments.clear();
        assert!(matches!(outcome(&volume, &ask(1, "a")), Some(Err(Refusal::NotAttached { .. }))), "detached meanwhile");
    }
}
