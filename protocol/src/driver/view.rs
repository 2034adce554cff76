//! A map as the driver uses it: who gets writes, who is read first, worked out once per map.

use crate::geometry::Geometry;
use crate::ids::{BootId, CopyId, Generation, Incarnation, LayerId, ServerId, SessionId};
use crate::map::{AccessMode, Group, Member, MemberState, Standing, VolumeMap};
use crate::mutants::{Mutant, on};

/// The members of one group of the top layer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// Servers of the `Active` and `Syncing` members: they get every write.
    pub(super) writers: Vec<ServerId>,
    /// Servers of the `Active` members, those first that are to be read first.
    pub(super) readers: Vec<ServerId>,
    /// The openings that writers have; when they change, nothing is known of their pages.
    openings: Vec<(CopyId, BootId)>,
}

/// What a map says about this driver's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) mode: AccessMode,
    pub(super) standing: Standing,
    pub(super) incarnation: Incarnation,
    pub(super) handled: Generation,
}

/// One map with what follows from it.
#[derive(Debug)]
pub(super) struct View {
    pub(super) map: VolumeMap,
    pub(super) layer: LayerId,
    pub(super) geometry: Geometry,
    /// By group of the top layer.
    pub(super) routes: Vec<Route>,
    /// Servers with a member that is `Active` or `Syncing`.
    pub(super) serving: Vec<ServerId>,
    /// Every group has a member to read from (I8).
    pub(super) available: bool,
    /// `None` if the map does not list the session.
    pub(super) session: Option<Listed>,
}

impl View {
    /// Of a valid map. Of members that are as good as each other those on servers that are named first in `near` are read
    /// first (locality).
    pub(super) fn new(map: VolumeMap, session: SessionId, near: &[ServerId]) -> Self {
        let top = *map.top();
        let groups = &map.placements[top.placement as usize].groups;
        let routes = groups.iter().map(|group| Route::new(group, near)).collect();
        let session = map.session(session).map(|s| Listed {
            mode: s.mode,
            standing: s.standing,
            incarnation: s.incarnation,
            handled: s.handled,
        });
        let available = map.groups().all(|(_, _, group)| group.first_active().is_some());
        Self {
            available,
            layer: top.id,
            geometry: map.geometry(&top),
            routes,
            serving: map.serving_servers(),
            session,
            map,
        }
    }

    pub(super) fn generation(&self) -> Generation {
        self.map.generation
    }

    /// Whether requests would be served: the session is listed and not held, and no group is without data.
    pub(super) fn admitted(&self) -> bool {
        let admitted = |s: Listed| s.standing == Standing::Admitted || on(Mutant::HeldServed);
        self.available && self.session.map_or(on(Mutant::EndedGoesOn), admitted)
    }

    /// The groups of a mask.
    pub(super) fn groups(&self, mask: u16) -> impl Iterator<Item = &Route> {
        self.routes.iter().enumerate().filter(move |(g, _)| mask & (1 << g) != 0).map(|(_, route)| route)
    }

    /// Whether what was known of the pages of an older map's members holds for this one's.
    pub(super) fn same_openings(&self, older: &Self) -> bool {
        self.layer == older.layer
            && self.routes.len() == older.routes.len()
            && self.routes.iter().zip(&older.routes).all(|(a, b)| a.openings == b.openings)
    }

    /// The serving members on a server.
    pub(super) fn copies_on(&self, server: ServerId) -> impl Iterator<Item = CopyId> {
        let on_it = self.map.members().filter(move |m| m.server == server && m.state != MemberState::Failed);
        on_it.map(|m| m.copy)
    }
}

impl Route {
    fn new(group: &Group, near: &[ServerId]) -> Self {
        let reads =
            |m: &&Member| m.state == MemberState::Active || on(Mutant::SyncingRead) && m.state == MemberState::Syncing;
        let mut active: Vec<_> = group.members.iter().filter(reads).collect();
        let distance = |m: &Member| near.iter().position(|id| *id == m.server).unwrap_or(usize::MAX);
        active.sort_by_key(|m| (m.avoid, distance(m))); // stable: map order within
        let gets = |m: &&Member| m.state == MemberState::Active || !on(Mutant::SyncingNotWritten);
        let writers: Vec<_> = group.writers().filter(gets).collect();
        Self {
            writers: writers.iter().map(|m| m.server).collect(),
            readers: active.iter().map(|m| m.server).collect(),
            openings: group.writers().map(|m| (m.copy, m.boot)).collect(),
        }
    }
}
