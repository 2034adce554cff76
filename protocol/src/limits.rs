//! Every limit of the protocol with its reason. Units last in the names.

/// Blocks, the unit of presence, checksums, wire addresses and lengths.
pub const BLOCK_BYTES: u32 = crate::layer::BLOCK_BYTES;
/// Smallest page and smallest chunk: below, page tables outgrow the data they describe.
pub const MIN_PAGE_BYTES: u32 = 64 << 10;
/// Largest page: a fill moves a page in one frame.
pub const MAX_PAGE_BYTES: u32 = 4 << 20;
/// Ordinals of members are bits of a 16-bit mask.
pub const MAX_ORDINALS: u8 = 16;
/// Copies of a group.
pub const MAX_COPIES: usize = 5;
/// Groups a volume is striped over.
pub const MAX_GROUPS: usize = 16;
/// An encoded map (PROTOCOL.md, Map).
pub const MAX_MAP_BYTES: usize = 64 << 10;
/// What a device keeps of one volume: promise, map, incarnations, handled.
pub const MAX_VOLUME_BLOB_BYTES: usize = MAX_MAP_BYTES + (8 << 10);
/// Payload of one frame: a page.
pub const MAX_PAYLOAD_BYTES: u32 = MAX_PAGE_BYTES;
/// A whole frame: header, body and payload.
pub const MAX_FRAME_BYTES: u32 = MAX_PAYLOAD_BYTES + (128 << 10);
/// Opaque proof of a right to open, reserved until grants land.
pub const MAX_GRANT_BYTES: usize = 4 << 10;
/// Requests under way per handle; one more is a protocol error, so nothing queues without bound.
pub const WINDOW_REQUESTS: u32 = 256;
/// Payload bytes under way per handle.
pub const WINDOW_BYTES: u64 = 16 << 20;
/// Handles alive at one server process; an `Open` beyond is refused.
pub const MAX_HANDLES: usize = 16 << 10;
/// Pages per volume that a driver leaves unconfirmed, and members have pending: at half of them it flushes by itself.
pub const MAX_PENDING_PAGES: usize = 4096;
/// Unflushed writes a driver keeps to write again after a loss (H5); a full buffer makes it flush.
pub const KEPT_WRITES_BYTES: u64 = 64 << 20;
/// How long a member's word that it serves lets a driver hand reads to the kernel (R5).
pub const READ_LEASE_MS: u64 = 5_000;
/// What the operator waits before new sessions after leaving a member out without its promise: 1.25 read leases (M7).
pub const READ_LEASE_WAIT_MS: u64 = READ_LEASE_MS * 5 / 4;
/// A driver that got no progress out of a member for so long reports it.
pub const STALL_TIMEOUT_MS: u64 = 5_000;
/// An idle driver flushes and confirms within this time, so idle volumes are clean.
pub const IDLE_CONFIRM_MS: u64 = 500;
/// A client's word of a generation further ahead than this is nonsense: no volume changes so often, and a leader that goes
/// on above it would come to the end of all numbers.
pub const MAX_GENERATIONS_AHEAD: u64 = 1 << 32;
/// A server behind a driver asks the operator at once and another member after this long.
pub const BEHIND_ASK_MEMBER_MS: u64 = 1_000;
/// A planned change is given up when a serving member has not answered the fence for this long, doubled at each retry.
pub const FENCE_PATIENCE_MS: u64 = 1_000;
/// Longest patience of a planned change.
pub const MAX_FENCE_PATIENCE_MS: u64 = 8_000;
/// A serving member that answered no fence for so long is failed although it answers heartbeats.
pub const FENCE_FAIL_MS: u64 = 10_000;
/// A member that is silent while all others restarted holds the change up for at most so long (H13, R15).
pub const SILENT_MEMBER_MS: u64 = 60_000;
/// Operator to server heartbeats.
pub const HEARTBEAT_MS: u64 = 1_000;
/// A server silent for so long has failed.
pub const HEARTBEAT_FAILED_MS: u64 = 3_000;
/// Share of the space kept for restarted and rewritten writes, overwrites, settles and deletes: 1 part in so many.
pub const SPACE_RESERVE_DIVISOR: u64 = 100;
/// Pages of credit a handle gets while space is plentiful.
pub const CREDIT_PAGES: u64 = 64;
/// While it is not: of the room that is left, one part in so many.
pub const CREDIT_SHARE: u64 = 8;
/// Pages that a server looks at for one `Written`: what a request costs stays bounded, whatever the layer holds.
pub const WRITTEN_PAGES: usize = 64;
