// A CUDA device made of host memory, for a CPU build of torch.
//
// There is one device. Its memory is malloc's, and its kernels are the CPU's: an operator that is
// given tensors of the device runs on CPU tensors over the same bytes. Streams are not here: the
// Python side keeps their order, and every operator has ended when it returns.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <map>
#include <mutex>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
const c10::Device kDevice(CUDA, 0), kHost(c10::DeviceType::CPU);

// --- the device: one, always the current one, with one stream as far as torch's core knows ---

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};
c10::impl::DeviceGuardImplRegistrar guard(CUDA, new Guard);

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? c10::alloc_cpu(size) : nullptr;
    return {data, data, &c10::free_cpu, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t size) const override { memcpy(to, from, size); }
};
Allocator memory;
REGISTER_ALLOCATOR(CUDA, &memory);

// --- pinned memory: the host's, remembered by address ---

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? c10::alloc_cpu(size) : nullptr;
    std::lock_guard lock(mutex);
    if (size) ends[data] = static_cast<char*>(data) + size;
    return {data, data, &free, kHost};
  }
  static void free(void* data) {
    {
      std::lock_guard lock(mutex);
      ends.erase(data);
    }
    c10::free_cpu(data);
  }
  static bool holds(const void* data) {
    std::lock_guard lock(mutex);
    auto block = ends.upper_bound(data);
    return block != ends.begin() && data < (--block)->second;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t size) const override { memcpy(to, from, size); }
  static inline std::mutex mutex;
  static inline std::map<const void*, const void*> ends;
};
Pinned pinned;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  bool isPinnedPtr(const void* data) const override { return Pinned::holds(data); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
};

// --- tensors over the same bytes ---

// A tensor of `storage` that looks at it as `like` looks at its own.
at::Tensor looking(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// A storage on `device` over the bytes of another, which it keeps alive.
c10::Storage over(const c10::Storage& other, c10::Device device, c10::Allocator* allocator) {
  c10::DataPtr data(
      const_cast<void*>(other.data()), new c10::Storage(other),
      [](void* kept) { delete static_cast<c10::Storage*>(kept); }, device);
  return {c10::Storage::use_byte_size_t(), other.nbytes(), std::move(data), allocator, true};
}

at::Tensor on_host(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto storage = over(t.storage(), kHost, c10::GetDefaultCPUAllocator());
  return looking(storage, t, c10::DispatchKey::CPU);
}

at::Tensor on_device(const at::Tensor& t) {
  if (!t.defined() || t.is_cuda()) return t;
  return looking(over(t.storage(), kDevice, &memory), t, c10::DispatchKey::CUDA);
}

// --- every operator that has no kernel below ---

// The tensors of the device that an operator was given, and the host's in their places.
struct Exchange {
  struct Pair {
    at::Tensor given, host;
    const void* began;  // the bytes of `host` before the operator ran
  };
  std::vector<Pair> pairs;
  const std::string& name;

  // Whether indices may lie on the host.
  bool indexes() const {
    return name == "aten::index" || name == "aten::index_put_" || name == "aten::index_put" ||
        name == "aten::_index_put_impl_";
  }

  at::Tensor to_host(const at::Tensor& t) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      TORCH_CHECK(t.dim() == 0 || (indexes() && at::isIntegralType(t.scalar_type(), true)), name,
                  ": expected all tensors to be on the same device, but found at least two devices, "
                  "cuda:0 and cpu!");
      return t;
    }
    for (auto& pair : pairs)
      if (pair.given.is_same(t)) return pair.host;
    auto host = on_host(t);
    pairs.push_back({t, host, host.storage().data()});
    return host;
  }

  // A result: a tensor that was given, a view of one, or a new one.
  at::Tensor to_device(const at::Tensor& t) const {
    if (!t.defined()) return t;
    for (auto& pair : pairs)
      if (pair.host.is_same(t)) return pair.given;
    for (auto& pair : pairs)
      if (pair.host.is_alias_of(t)) return looking(pair.given.storage(), t, c10::DispatchKey::CUDA);
    return on_device(t);
  }

  // What the operator made of the tensors themselves: other sizes, or another storage.
  void settle() const {
    for (auto& pair : pairs) {
      auto* given = pair.given.unsafeGetTensorImpl();
      if (pair.host.storage().data() != pair.began) {
        given->set_storage_keep_dtype(over(pair.host.storage(), kDevice, &memory));
      }
      if (pair.host.sizes() != given->sizes() || pair.host.strides() != given->strides()) {
        given->set_sizes_and_strides(
            pair.host.sizes(), pair.host.strides(), pair.host.storage_offset());
      }
    }
  }

  template <class Change>
  static void change(c10::IValue& value, const Change& change) {
    if (value.isTensor()) {
      value = change(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(change(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional(change(*t)) : std::nullopt);
      value = list;
    }
  }
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Exchange exchange{{}, schema.operator_name().name};
  const size_t first = stack->size() - schema.arguments().size();
  for (size_t i = first; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    Exchange::change(value, [&](const at::Tensor& t) { return exchange.to_host(t); });
    if (value.isDevice()) value = kHost;
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  exchange.settle();
  for (size_t i = first; i < stack->size(); ++i)
    Exchange::change((*stack)[i], [&](const at::Tensor& t) { return exchange.to_device(t); });
}

// --- kernels that the host has not, or that know of two devices ---

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<c10::Device>, std::optional<bool> pin,
                 std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<c10::Device>, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_strided_generic(size, stride, &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& from, bool) {
  if (!self.is_same(from)) on_host(self).copy_(on_host(from));
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.size() == size.size()) {
    impl->set_sizes_and_strides(size, stride, offset);
  } else {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  }
  return self;
}

// Operands of 16 bits, sums of 32.
at::Tensor mm(const at::Tensor& left, const at::Tensor& right, at::ScalarType out) {
  TORCH_CHECK(left.dtype() == right.dtype(), "mm: operands of two dtypes");
  return on_device(at::mm(on_host(left).to(out), on_host(right).to(out)));
}
at::Tensor addmm(const at::Tensor& total, const at::Tensor& left, const at::Tensor& right,
                 at::ScalarType out, const at::Scalar& beta, const at::Scalar& alpha) {
  TORCH_CHECK(left.dtype() == right.dtype(), "addmm: operands of two dtypes");
  return on_device(at::addmm(
      on_host(total).to(out), on_host(left).to(out), on_host(right).to(out), beta, alpha));
}

}  // namespace

namespace at {
namespace {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks);
}
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("mm.dtype", &mm);
  m.impl("addmm.dtype", &addmm);
}

// For Triton's interpreter, which reads and writes through pointers.
TORCH_LIBRARY(simulated_gpu, m) { m.def("on_host(Tensor t) -> Tensor"); }
TORCH_LIBRARY_IMPL(simulated_gpu, CUDA, m) { m.impl("on_host", &on_host); }
TORCH_LIBRARY_IMPL(simulated_gpu, CPU, m) { m.impl("on_host", &on_host); }
