//! The types of PTX.

/// A fundamental type, as the last part of an opcode or of a declaration names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named as in PTX")]
pub enum Type {
    B8,
    B16,
    B32,
    B64,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    F32,
    F64,
    Pred,
}

impl Type {
    /// The type called `name` (no leading dot).
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "b8" => Self::B8,
            "b16" => Self::B16,
            "b32" => Self::B32,
            "b64" => Self::B64,
            "u8" => Self::U8,
            "u16" => Self::U16,
            "u32" => Self::U32,
            "u64" => Self::U64,
            "s8" => Self::S8,
            "s16" => Self::S16,
            "s32" => Self::S32,
            "s64" => Self::S64,
            "f16" => Self::F16,
            "f16x2" => Self::F16x2,
            "bf16" => Self::Bf16,
            "bf16x2" => Self::Bf16x2,
            "tf32" => Self::Tf32,
            "f32" => Self::F32,
            "f64" => Self::F64,
            "pred" => Self::Pred,
            _ => return None,
        })
    }

    /// Its size. A predicate has one bit.
    pub fn bits(self) -> u32 {
        match self {
            Self::Pred => 1,
            Self::B8 | Self::U8 | Self::S8 => 8,
            Self::B16 | Self::U16 | Self::S16 | Self::F16 | Self::Bf16 => 16,
            Self::B32 | Self::U32 | Self::S32 | Self::F32 => 32,
            Self::F16x2 | Self::Bf16x2 | Self::Tf32 => 32,
            Self::B64 | Self::U64 | Self::S64 | Self::F64 => 64,
        }
    }

    /// Its size in memory.
    pub fn bytes(self) -> u32 {
        self.bits().div_ceil(8)
    }

    /// The C++ type of a value of this type. Types with fewer than 32 bits of mantissa and exponent are
    /// kept as their bit patterns.
    pub fn cpp(self) -> &'static str {
        match self {
            Self::Pred => "bool",
            Self::F32 => "float",
            Self::F64 => "double",
            Self::S8 => "int8_t",
            Self::S16 => "int16_t",
            Self::S32 => "int32_t",
            Self::S64 => "int64_t",
            other => Self::unsigned_cpp(other.bits()),
        }
    }

    fn unsigned_cpp(bits: u32) -> &'static str {
        match bits {
            8 => "uint8_t",
            16 => "uint16_t",
            32 => "uint32_t",
            _ => "uint64_t",
        }
    }

    /// Untyped or signed or unsigned integer.
    pub fn is_integer(self) -> bool {
        !self.is_native_float()
            && !self.is_half()
            && !self.is_packed()
            && self != Self::Tf32
            && self != Self::Pred
    }

    /// `f32` or `f64`: a float of C++ too.
    pub fn is_native_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64)
    }

    /// `f16` or `bf16`.
    pub fn is_half(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16)
    }

    /// Two halves in one register.
    pub fn is_packed(self) -> bool {
        matches!(self, Self::F16x2 | Self::Bf16x2)
    }

    /// A signed integer.
    pub fn is_signed(self) -> bool {
        matches!(self, Self::S8 | Self::S16 | Self::S32 | Self::S64)
    }

    /// The unsigned integer of the same size.
    pub fn unsigned(self) -> Self {
        Self::unsigned_of(self.bits())
    }

    /// The unsigned integer of `bits` bits.
    pub fn unsigned_of(bits: u32) -> Self {
        match bits {
            8 => Self::U8,
            16 => Self::U16,
            32 => Self::U32,
            _ => Self::U64,
        }
    }

    /// The integer of the same signedness and twice the size.
    pub fn wide(self) -> Self {
        match self {
            Self::S8 => Self::S16,
            Self::S16 => Self::S32,
            Self::S32 => Self::S64,
            other => Self::unsigned_of(other.bits() * 2),
        }
    }
}
