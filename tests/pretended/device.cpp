// A pretended CUDA device: tensors are on cuda:0, their memory is the host's, and their kernels are the CPU's.
//
// An operator on tensors of both devices raises, as on a GPU. An operator for which a GPU's host would wait is counted,
// and raises while syncs are refused. Live bytes and their peak are counted, and an allocation beyond the total raises
// torch.OutOfMemoryError. Nothing is shown of streams, of a real kernel's numbers or temporary memory, or of speed.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <dlfcn.h>
#include <torch/extension.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

namespace {

using c10::DeviceIndex;
using c10::DispatchKey;
using c10::DispatchKeySet;
const c10::Device GPU(c10::DeviceType::CUDA, 0);
const c10::Stream STREAM(c10::Stream::DEFAULT, GPU);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return GPU.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return STREAM; }
  c10::Stream getDefaultStream(c10::Device) const override { return STREAM; }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return STREAM; }
  c10::Stream getNewStream(c10::Device, int) const override { return STREAM; }
  c10::Stream exchangeStream(c10::Stream) const override { return STREAM; }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
const c10::impl::DeviceGuardImplRegistrar registered(GPU.type(), new Guard());

// Memory: live bytes, their peak, and the total beyond which an allocation fails

std::atomic<int64_t> live{0}, peak{0}, total{int64_t(80) << 30};

void take(size_t bytes) {
  const int64_t now = live += int64_t(bytes);
  if (now > total) {
    live -= int64_t(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes. GPU 0 (pretended) "
                     "has a total capacity of ", total.load(), " bytes, of which ", live.load(), " are allocated.");
  }
  int64_t most = peak;
  while (now > most && !peak.compare_exchange_weak(most, now)) {
  }
}

// Memory that is not counted, behind a header that has its size.
constexpr size_t HEADER = 64;

void* allocate_with_size(size_t bytes) {
  auto* start = static_cast<char*>(c10::alloc_cpu(bytes + HEADER));
  *reinterpret_cast<size_t*>(start) = bytes;
  return start + HEADER;
}

size_t free_with_size(void* data) {
  char* start = static_cast<char*>(data) - HEADER;
  const size_t bytes = *reinterpret_cast<size_t*>(start);
  c10::free_cpu(start);
  return bytes;
}

void give_back(void* data) { live -= int64_t(free_with_size(data)); }

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    take(bytes);
    void* data = allocate_with_size(bytes);
    return {data, data, &give_back, GPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;

// Page-locked memory of the host: copies from and to it need not wait.
std::mutex pinned_lock;
std::map<const char*, size_t> pinned;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> hold(pinned_lock);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  if (after == pinned.begin()) return false;
  const auto& [start, bytes] = *std::prev(after);
  return static_cast<const char*>(data) < start + std::max<size_t>(bytes, 1);
}

void free_pinned(void* data) {
  {
    std::lock_guard<std::mutex> hold(pinned_lock);
    pinned.erase(static_cast<const char*>(data));
  }
  free_with_size(data);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = allocate_with_size(bytes);
    std::lock_guard<std::mutex> hold(pinned_lock);
    pinned[static_cast<const char*>(data)] = bytes;
    return {data, data, &free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
PinnedMemory pinned_memory;

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const at::Generator generator = at::detail::getDefaultCPUGenerator();
    return generator;
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void deviceSynchronize(DeviceIndex) const override {}
  c10::Device getDeviceFromPtr(void*) const override { return GPU; }
};

// What is counted: kernels, and what passes between host and device

std::atomic<int64_t> launched{0};
std::atomic<bool> refused{false};
PyObject* listener = nullptr;  // called with the name of each wait and copy; never freed
std::atomic<bool> heard{false};

void tell(const std::string& what) {
  if (!heard) return;
  py::gil_scoped_acquire hold;
  const py::handle function{listener};
  function(what);
}

const std::set<std::string> WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero",      "aten::masked_select", "aten::unique_dim", "aten::_unique2",
    "aten::unique_consecutive",  "aten::_unique",      "aten::equal",         "aten::bincount",   "aten::is_nonzero",
    "aten::repeat_interleave"};

// Their indices may be on the host on a GPU too.
const std::set<std::string> INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put",
                                        "aten::_unsafe_index"};

void wait_for_device(const std::string& what) {
  tell("wait: " + what);
  TORCH_CHECK(!refused, "called a synchronizing CUDA operation: ", what);
}

bool only_views(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns())
    if (result.alias_info() == nullptr || result.alias_info()->isWrite()) return false;
  return !schema.returns().empty();
}

// A call's storages on both devices. A storage of the host that shares a device tensor's memory is made once a call, so
// that arguments which share memory, and results which are views of them, share it on both sides.
struct Call {
  std::unordered_map<c10::StorageImpl*, c10::Storage> hosts, devices;
  DispatchKeySet keys;  // of the first device tensor, for results that are views

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cuda()) return tensor;
    if (keys.empty()) keys = tensor.key_set();
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto found = hosts.find(storage);
    if (found == hosts.end()) {
      c10::Storage host(c10::Storage::use_byte_size_t(), storage->nbytes(),
                        c10::DataPtr(storage->mutable_data(), c10::Device(c10::DeviceType::CPU)),
                        c10::GetCPUAllocator(), true);
      devices[host.unsafeGetStorageImpl()] = tensor.storage();
      found = hosts.emplace(storage, host).first;
    }
    auto host = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(found->second), DispatchKeySet(DispatchKey::CPU),
                                                         tensor.dtype());
    host.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
    host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) host.unsafeGetTensorImpl()->set_wrapped_number(true);
    return host;
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto found = devices.find(storage);
    const bool view = found != devices.end() && !keys.empty();
    if (found == devices.end()) found = devices.emplace(storage, held(tensor.storage())).first;
    c10::Storage device = found->second;
    auto made = view ? at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(device), keys,
                                                                tensor.dtype())
                     : at::detail::make_tensor<c10::TensorImpl>(std::move(device), DispatchKeySet(DispatchKey::CUDA),
                                                                tensor.dtype());
    made.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
    return made;
  }

  // A device storage over the memory of a host storage, which it keeps.
  static c10::Storage held(const c10::Storage& host) {
    take(host.nbytes());
    auto* keeper = new c10::Storage(host);
    auto release = [](void* context) {
      auto* kept = static_cast<c10::Storage*>(context);
      live -= int64_t(kept->nbytes());
      delete kept;
    };
    c10::DataPtr data(host.unsafeGetStorageImpl()->mutable_data(), keeper, release, GPU);
    return c10::Storage(c10::Storage::use_byte_size_t(), host.nbytes(), std::move(data), &memory, true);
  }
};

// Runs an operator on the CPU: its tensors' memory is the host's.
void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  if (!only_views(schema)) launched++;
  if (WAITING.count(name) != 0) wait_for_device(name);
  const bool host_indices = INDEXING.count(name) != 0;
  Call call;
  auto convert = [&](const at::Tensor& tensor) {
    const bool on_cpu = tensor.defined() && tensor.device().is_cpu() && tensor.dim() > 0;
    TORCH_CHECK(!on_cpu || host_indices, "Expected all tensors to be on the same device in ", name);
    return call.to_host(tensor);
  };
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  std::vector<at::Tensor> given(count), hosts(count);
  std::vector<std::vector<at::Tensor>> lists(count);
  for (size_t i = 0; i < count; i++) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      given[i] = value.toTensor();
      hosts[i] = convert(given[i]);
      value = hosts[i];
    } else if (value.isTensorList()) {
      lists[i] = value.toTensorVector();
      auto converted = lists[i];
      for (auto& tensor : converted) tensor = convert(tensor);
      value = c10::IValue(converted);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> converted;
      for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList())
        converted.push_back(tensor && tensor->defined() ? std::optional<at::Tensor>(convert(*tensor)) : tensor);
      value = c10::IValue(converted);
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = c10::Device(c10::DeviceType::CPU);
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  }
  auto written = [&](size_t i) {
    const auto* alias = schema.arguments()[i].alias_info();
    return alias != nullptr && alias->isWrite();
  };
  for (size_t i = 0; i < count; i++) {
    if (!written(i) || !given[i].defined() || !given[i].device().is_cuda()) continue;
    auto* tensor = given[i].unsafeGetTensorImpl();
    if (hosts[i].storage().data() != given[i].storage().data())  // a result that has grown
      tensor->set_storage_keep_dtype(Call::held(hosts[i].storage()));
    if (hosts[i].sizes() != given[i].sizes() || hosts[i].strides() != given[i].strides())
      tensor->set_sizes_and_strides(hosts[i].sizes(), hosts[i].strides());
  }
  const size_t results = schema.returns().size(), at = stack->size() - results;
  for (size_t r = 0; r < results; r++) {
    auto& value = (*stack)[at + r];
    const auto* alias = schema.returns()[r].alias_info();
    // A result that is an argument, written in place, is that very tensor.
    size_t same = count;
    for (size_t i = 0; alias != nullptr && alias->isWrite() && i < count; i++)
      if (written(i) && schema.arguments()[i].alias_info()->beforeSets() == alias->beforeSets()) same = i;
    if (value.isTensor()) {
      value = same < count ? given[same] : call.to_device(value.toTensor());
    } else if (value.isTensorList()) {
      auto converted = same < count ? lists[same] : value.toTensorVector();
      for (auto& tensor : converted) tensor = call.to_device(tensor);
      value = c10::IValue(converted);
    }
  }
}

// Operators that a CPU's kernel on the same memory cannot stand for

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, DispatchKeySet(DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

// Copies between host and device have a name by their direction and by whether the host waits for them; it does where
// the host's memory is not page-locked, or the call blocks. A number without dimensions comes as a kernel's argument.
void tell_copy(const at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  const bool to_host = to.device().is_cpu();
  if (!to_host && !from.device().is_cpu()) return;
  const at::Tensor& host = to_host ? to : from;
  if (host.numel() == 0 || (!to_host && from.dim() == 0 && from.unsafeGetTensorImpl()->is_wrapped_number())) return;
  const bool page_locked = is_pinned(host.const_data_ptr());
  const std::string what = to_host ? "copy to the host" : "copy to the device";
  if (page_locked && non_blocking) {
    tell(what);
  } else {
    wait_for_device(what + (page_locked ? ", blocking" : ", pageable"));
  }
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  launched++;
  tell_copy(to, from, non_blocking);
  Call call;
  at::Tensor host = call.to_host(to);
  at::AutoDispatchBelowADInplaceOrView guard;
  host.copy_(call.to_host(from));
  return to;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  at::Tensor into = to;
  return copy(into, from, non_blocking);
}

const at::Tensor& resize(const at::Tensor& tensor, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  if (tensor.sizes() == size) return tensor;
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  const size_t bytes = (tensor.numel() + tensor.storage_offset()) * tensor.dtype().itemsize();
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    auto data = memory.allocate(bytes);
    if (storage->nbytes() != 0) std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(bytes);
  }
  return tensor;
}

at::Tensor& set(at::Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  TORCH_CHECK(storage.device() == tensor.device(), "set_: the storage is on another device");
  auto* into = tensor.unsafeGetTensorImpl();
  into->set_storage_keep_dtype(std::move(storage));
  into->set_storage_offset(offset);
  if (stride.size() == size.size()) {
    into->set_sizes_and_strides(size, stride);
  } else {
    into->set_sizes_contiguous(size);
  }
  return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage) {
  const auto numbers = int64_t(storage.nbytes() / tensor.dtype().itemsize());
  return set(tensor, std::move(storage), 0, {numbers}, {1});
}

at::Tensor& set_nothing(at::Tensor& tensor) {
  return set(tensor, c10::Storage(c10::Storage::use_byte_size_t(), 0, &memory, true), 0, {0}, {1});
}

at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& source) {
  return set(tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy);
  library.impl("_copy_from", copy_from);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_", set_nothing);
  // Without a kernel of the device it would read the experts' sizes, which a GPU's does not in bfloat16.
  library.impl("_grouped_mm", torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  c10::SetAllocator(GPU.type(), &memory, 10);
  auto** slot = static_cast<void**>(dlsym(RTLD_DEFAULT, "pretended_hooks"));
  TORCH_CHECK(slot != nullptr, "accelerator.so must be loaded before torch, by LD_PRELOAD");
  *slot = static_cast<at::CUDAHooksInterface*>(new Hooks());
  module.def("launched", [] { return launched.load(); });
  module.def("wait", [](const std::string& what) { wait_for_device(what); });
  module.def("listen", [](py::function function) {
    listener = function.release().ptr();
    heard = true;
  });
  module.def("set_total", [](int64_t bytes) { total = bytes; });
  module.def("live", [] { return live.load(); });
  module.def("peak", [] { return peak.load(); });
  module.def("reset_peak", [] { peak = live.load(); });
  module.def("refuse_waiting", [](bool refuse) { refused = refuse; });
  module.def("on_host", [](const at::Tensor& tensor) { return Call().to_host(tensor.detach()); });
}
