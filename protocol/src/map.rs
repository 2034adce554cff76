//! The configuration map of a volume (PROTOCOL.md, Map; seed 002 \[0025\]–\[0026\]).
//!
//! Which servers, which copies in which state, which layers, which sessions. It changes only by a new generation, and
//! whatever is in it counts as it stands: state that is not here does not exist for the protocol. The map is a value;
//! who may commit which next map is decided in `management`.

use crate::geometry::Geometry;
use crate::ids::{BootId, CopyId, Generation, Incarnation, LayerId, ServerId, SessionId, VolumeId};
use crate::limits::{BLOCK_BYTES, MAX_COPIES, MAX_GROUPS, MAX_ORDINALS, MAX_PAGE_BYTES, MIN_PAGE_BYTES};

/// The map format that this code writes; it reads its predecessor too (there is none yet).
pub const MAP_FORMAT: u32 = 1;

/// The whole configuration of one volume at one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeMap {
    /// The volume.
    pub volume: VolumeId,
    /// The generation at which this map was proposed.
    pub generation: Generation,
    /// [`MAP_FORMAT`] of the writer.
    pub format: u32,
    /// Bits that a reader must know, or it serves nothing of this volume.
    pub required_features: u64,
    /// Bytes; a multiple of 4096.
    pub size: u64,
    /// Whether the access mode allows several sessions (then nothing is rewritten after a loss, H5).
    pub multi_session: bool,
    /// Every server that a member names, with where it listens for block connections.
    pub servers: Vec<ServerEntry>,
    /// Placements, named by their index from layers.
    pub placements: Vec<Placement>,
    /// Layers, top first. At least one.
    pub layers: Vec<Layer>,
    /// Who may send requests.
    pub sessions: Vec<Session>,
    /// Fenced lock holders (PROTOCOL.md §7). Empty until shared volumes land.
    pub revoked: Vec<Revocation>,
}

/// A server and its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerEntry {
    /// Which.
    pub id: ServerId,
    /// `host:port` of its block listener, tried in order.
    pub addresses: Vec<String>,
}

/// Where the groups of a layer lie.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Placement {
    /// Group g of the stripe is `groups[g]`.
    pub groups: Vec<Group>,
}

/// The members that hold one share of the stripe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// In map order: the first `Active` one is authoritative in a settle, and read first.
    pub members: Vec<Member>,
    /// The last generation at which the group went on without any member that was `Active` before and kept its boot id
    /// (H5, R2); 0 = never.
    pub loss: Generation,
    /// Whether suspect pages are being made equal.
    pub settle: Settle,
}

/// The settle of a group (H12, R1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Settle {
    /// Nothing was to settle since the map that lists it so.
    #[default]
    None,
    /// Under way. Settled pages count only for exactly this source, boot and beginning (M3).
    Running {
        /// The copy whose word counts.
        authoritative: CopyId,
        /// The boot id under which it does.
        boot: BootId,
        /// The generation that began this settle.
        begun: Generation,
    },
    /// This generation ends a settle: members that it lists with their own boot id clear what it settled.
    Over,
}

/// What a member is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemberState {
    /// Holds every acknowledged write; serves.
    Active,
    /// Receives every write, is being filled, is not read.
    Syncing,
    /// Stores maps, receives and serves nothing.
    Failed,
}

/// One copy's place in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its bit in masks, 0–15, unique in the group and never given to another copy while masks may name it.
    pub ordinal: u8,
    /// The copy.
    pub copy: CopyId,
    /// The server that holds it.
    pub server: ServerId,
    /// The opening of its device that the map speaks of (H2).
    pub boot: BootId,
    /// What it is good for.
    pub state: MemberState,
    /// Receives writes but is read only if nothing else can (seed 003 c15).
    pub avoid: bool,
    /// Was left out without its promise; until it has promised or the read lease is over no new session is admitted (M7).
    pub unpromised: bool,
}

/// How a layer spreads blocks over members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Scheme {
    /// Every member of a group holds all of the group's share.
    #[default]
    Replicate,
}

/// One translucent layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Which.
    pub id: LayerId,
    /// Bytes of the volume when the layer was sealed; for the top layer the volume's size.
    pub size: u64,
    /// Bytes of a page.
    pub page_bytes: u32,
    /// Spread.
    pub scheme: Scheme,
    /// Bytes of a stripe chunk.
    pub chunk_bytes: u32,
    /// Index of its placement.
    pub placement: u32,
    /// The generation that sealed it; the top layer is open.
    pub sealed: Option<Generation>,
}

/// What a session may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AccessMode {
    /// Reads and writes.
    ReadWrite,
    /// Reads only: a write of it is a protocol error.
    ReadOnly,
}

/// Whether a session's requests are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// Served.
    Admitted,
    /// Waits for a settle (M5): its requests are answered `Stale`.
    Held,
}

/// One attachment of the volume to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Which.
    pub id: SessionId,
    /// Name of the node, for people; no decision rests on it but locality.
    pub node: String,
    /// What it may do.
    pub mode: AccessMode,
    /// The highest incarnation that any fence reply reported (H20).
    pub incarnation: Incarnation,
    /// Losses up to this generation are handled (R2).
    pub handled: Generation,
    /// Whether it is served.
    pub standing: Standing,
}

/// A fenced range of a session (PROTOCOL.md §7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revocation {
    /// The holder.
    pub session: SessionId,
    /// Requests of it sent under an older map than this are refused in the ranges.
    pub below: Generation,
    /// Byte ranges `(start, length)`; empty = the whole volume.
    pub ranges: Vec<(u64, u64)>,
}

impl Group {
    /// The members in this state, in map order.
    pub fn in_state(&self, state: MemberState) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |m| m.state == state)
    }

    /// The members that must have every write: `Active` and `Syncing`.
    pub fn writers(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|m| m.state != MemberState::Failed)
    }

    /// The member that holds this copy.
    pub fn member(&self, copy: CopyId) -> Option<&Member> {
        self.members.iter().find(|m| m.copy == copy)
    }

    /// The authoritative copy for a settle: the first `Active` member in map order.
    pub fn first_active(&self) -> Option<&Member> {
        self.in_state(MemberState::Active).next()
    }
}

impl VolumeMap {
    /// The layer that takes writes.
    pub fn top(&self) -> &Layer {
        self.layers.first().expect("validated: a map has at least one layer")
    }

    /// The geometry of a layer in this map.
    pub fn geometry(&self, layer: &Layer) -> Geometry {
        let groups = self.placements[layer.placement as usize].groups.len() as u32;
        Geometry { groups, chunk_bytes: layer.chunk_bytes, page_bytes: layer.page_bytes, size: layer.size }
    }

    /// Every group with its placement and group number.
    pub fn groups(&self) -> impl Iterator<Item = (u32, u32, &Group)> {
        self.placements.iter().enumerate().flat_map(|(p, placement)| {
            placement.groups.iter().enumerate().map(move |(g, group)| (p as u32, g as u32, group))
        })
    }

    /// Every member of every group.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.groups().flat_map(|(_, _, group)| group.members.iter())
    }

    /// The session, if the map lists it.
    pub fn session(&self, id: SessionId) -> Option<&Session> {
        self.sessions.iter().find(|s| s.id == id)
    }

    /// The server's entry.
    pub fn server(&self, id: ServerId) -> Option<&ServerEntry> {
        self.servers.iter().find(|s| s.id == id)
    }

    /// The member of a group that lies on this server (never two copies of a group on one server).
    pub fn member_on(&self, placement: u32, group: u32, server: ServerId) -> Option<&Member> {
        self.placements.get(placement as usize)?.groups.get(group as usize)?.members.iter().find(|m| m.server == server)
    }

    /// The place of a copy: placement, group and member.
    pub fn place_of(&self, copy: CopyId) -> Option<(u32, u32, &Member)> {
        self.groups().find_map(|(p, g, group)| group.member(copy).map(|m| (p, g, m)))
    }

    /// The servers on which at least one member serves (`Active` or `Syncing`).
    pub fn serving_servers(&self) -> Vec<ServerId> {
        let mut ids: Vec<_> = self.members().filter(|m| m.state != MemberState::Failed).map(|m| m.server).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// The highest loss of any group.
    pub fn loss(&self) -> Generation {
        self.groups().map(|(_, _, g)| g.loss).max().unwrap_or_default()
    }

    /// Whether any group is being settled.
    pub fn settling(&self) -> bool {
        self.groups().any(|(_, _, g)| matches!(g.settle, Settle::Running { .. }))
    }

    /// Whether the map is one that the protocol allows; every reader checks it before it believes anything.
    pub fn validate(&self) -> Result<(), InvalidMap> {
        self.validate_shape()?;
        for (_, _, group) in self.groups() {
            self.validate_group(group)?;
        }
        for layer in &self.layers {
            self.validate_layer(layer)?;
        }
        let sealed = |layer: &Layer| layer.sealed.is_some();
        if sealed(self.top()) || !self.layers[1..].iter().all(sealed) {
            return Err(InvalidMap::Sealing);
        }
        let mut ids: Vec<_> = self.sessions.iter().map(|s| s.id).collect();
        ids.sort_unstable();
        if ids.windows(2).any(|w| w[0] == w[1]) { Err(InvalidMap::RepeatedSession) } else { Ok(()) }
    }

    fn validate_shape(&self) -> Result<(), InvalidMap> {
        if self.format != MAP_FORMAT || self.required_features != 0 {
            return Err(InvalidMap::Unsupported { format: self.format, features: self.required_features });
        }
        let shape_ok = !self.layers.is_empty()
            && !self.placements.is_empty()
            && self.size > 0
            && self.size.is_multiple_of(u64::from(BLOCK_BYTES))
            && self.generation > Generation(0)
            && self.top().size == self.size
            && self.placements.iter().all(|p| (1..=MAX_GROUPS).contains(&p.groups.len()));
        if shape_ok { Ok(()) } else { Err(InvalidMap::Shape) }
    }

    fn validate_group(&self, group: &Group) -> Result<(), InvalidMap> {
        let mut ordinals = 0u16;
        let mut servers = Vec::new();
        for member in &group.members {
            if member.ordinal >= MAX_ORDINALS || ordinals & (1 << member.ordinal) != 0 {
                return Err(InvalidMap::Ordinal { copy: member.copy });
            }
            ordinals |= 1 << member.ordinal;
            if servers.contains(&member.server) {
                return Err(InvalidMap::TwoCopiesOnOneServer { server: member.server });
            }
            if self.server(member.server).is_none() {
                return Err(InvalidMap::UnknownServer { server: member.server });
            }
            servers.push(member.server);
        }
        let serving = group.writers().count();
        if group.members.is_empty() || serving > MAX_COPIES + 1 { Err(InvalidMap::Shape) } else { Ok(()) }
    }

    fn validate_layer(&self, layer: &Layer) -> Result<(), InvalidMap> {
        let power_in = |bytes: u32, max: u32| bytes.is_power_of_two() && (MIN_PAGE_BYTES..=max).contains(&bytes);
        let fits = power_in(layer.page_bytes, MAX_PAGE_BYTES)
            && power_in(layer.chunk_bytes, layer.page_bytes)
            && (layer.placement as usize) < self.placements.len();
        if fits { Ok(()) } else { Err(InvalidMap::Layer { layer: layer.id }) }
    }
}

/// Why a map is not one. Whoever reads one from outside refuses it and says so; nothing of it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMap {
    /// A newer Lamina wrote it.
    #[error("map format {format} or features {features:#x} are not known here: a newer Lamina wrote it")]
    Unsupported {
        /// The writer's format.
        format: u32,
        /// What it demands.
        features: u64,
    },
    /// Empty or out of range.
    #[error("the map has no layers or groups, or a size that is not whole blocks")]
    Shape,
    /// A layer's sizes.
    #[error("layer {layer} has a page or chunk size out of range, or no placement")]
    Layer {
        /// Which.
        layer: LayerId,
    },
    /// Only the top layer may be open, and it must be.
    #[error("exactly the top layer must be open")]
    Sealing,
    /// An ordinal out of range or given twice.
    #[error("copy {copy} has an ordinal that is out of range or taken")]
    Ordinal {
        /// Whose.
        copy: CopyId,
    },
    /// Never two copies on one server.
    #[error("two copies of one group on server {server}")]
    TwoCopiesOnOneServer {
        /// Where.
        server: ServerId,
    },
    /// A member on a server that is not listed.
    #[error("a member lies on server {server}, which the map does not list")]
    UnknownServer {
        /// Which.
        server: ServerId,
    },
    /// A session stands twice.
    #[error("a session is listed twice")]
    RepeatedSession,
}
