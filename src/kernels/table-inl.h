// The functions of the *-inl.h files as one table, the same for every vector set. Included last.

constexpr Kernels TableFor(Isa isa) {
  return {
      .isa = isa,
      .rms_norm = RmsNorm,
      .quantize_static = QuantizeStatic,
      .quantize_dynamic = QuantizeDynamic,
      .to_bf16 = ToBf16Row,
      .to_float = ToFloatRow,
      .silu_mul = SiluMul,
      .rope = Rope,
      .add_fixed = AddFixed,
      .sigmoid = SigmoidRow,
      .range = Range,
      .select = Select,
      .exp_sum = ExpSum,
      .near_exp_sum = NearExpSum,
      .log = ScalarLog,
      .gemm_int8_static = GemmInt8Static,
      .gemm_int8_dynamic = GemmInt8Dynamic,
      .gemm_int8_dynamic_fixed = GemmInt8DynamicFixed,
      .gemm_int8_static_fixed = GemmInt8StaticFixed,
      .gemm_bf16 = GemmBf16,
      .gemm_bf16_float = GemmBf16Float,
      .gemm_bf16_fixed = GemmBf16Fixed,
      .gemm_float = GemmFloat,
      .attention = Attention,
      .attention_block = AttentionBlock,
      .attention_merge = MergeAttention,
      .attention_finish = FinishAttention,
  };
}
