// Python sees programs, launches and what comes back of them; tensors are addresses with names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "global_shadow.h"
#include "report.h"

namespace py = pybind11;

namespace llmkern {
namespace emulator {
namespace {

constexpr int64_t kMostShared = 256 * 1024;

const Kernel& find_kernel(const Program& program, const std::string& name) {
  for (const auto& kernel : program.kernels) {
    if (kernel->name == name) return *kernel;
  }
  throw py::value_error("the module has no kernel '" + name + "'");
}

py::dict describe_kernel(const Program& program, const std::string& name) {
  const Kernel& k = find_kernel(program, name);
  py::list parameters;
  for (const Parameter& p : k.parameters)
    parameters.append(py::make_tuple(p.name, p.offset, p.bytes));
  py::dict d;
  d["parameters"] = parameters;
  d["parameter_bytes"] = k.parameter_bytes;
  d["static_shared"] = k.static_shared;
  d["dynamic_base"] = k.dynamic_base;
  d["local_bytes"] = k.local_bytes;
  d["threads_required"] = k.threads_required;
  d["threads_max"] = k.threads_max;
  d["instructions"] = k.code.size();
  d["tracked"] = k.tracked.size();
  return d;
}

py::dict describe_report(const Report& r) {
  py::dict d;
  d["check"] = r.check;
  d["message"] = r.message;
  d["kernel"] = r.kernel;
  d["source"] = r.source;
  d["line"] = r.line;
  d["text"] = r.text;
  d["other_source"] = r.other_source;
  d["other_line"] = r.other_line;
  d["other_text"] = r.other_text;
  d["cta"] = py::make_tuple(r.cta[0], r.cta[1], r.cta[2]);
  d["warp"] = r.warp;
  d["lane"] = r.lane;
  d["str"] = r.str();
  return d;
}

// By instruction: (class, PTX line, PTX text, source).
py::list describe_instructions(const Program& program, const std::string& name) {
  py::list rows;
  for (const Instr& in : find_kernel(program, name).code) {
    rows.append(py::make_tuple(kClassNames[static_cast<int>(in.klass)], in.place.line,
                               statement_text(program, in.place), source_of(program, in.place)));
  }
  return rows;
}

// Adds to 7 int64 for each instruction: runs, lanes, bytes, sectors, ideal sectors, wavefronts,
// ideal ones. The exit that follows the last statement is left out.
void add_counts(const std::vector<Count>& counts, int64_t* to) {
  for (size_t i = 0; i + 1 < counts.size(); ++i) {
    const Count& c = counts[i];
    const uint64_t row[] = {c.runs,
                            c.full_runs * kLanes + c.lanes,
                            c.bytes,
                            c.sectors,
                            c.ideal_sectors,
                            c.wavefronts,
                            c.ideal_wavefronts};
    for (uint64_t v : row) *to++ += static_cast<int64_t>(v);
  }
}

Options read_options(const py::dict& d) {
  Options o;
  o.bounds = d["bounds"].cast<bool>();
  o.uninitialised = d["uninitialised"].cast<bool>();
  o.races = d["races"].cast<bool>();
  o.warp_races = d["warp_races"].cast<bool>();
  o.global_races = d["global_races"].cast<bool>();
  o.async_copies = d["async_copies"].cast<bool>();
  o.collectives = d["collectives"].cast<bool>();
  o.counters = d["counters"].cast<bool>();
  o.threads = d["threads"].cast<int>();
  o.seed = d["seed"].cast<uint64_t>();
  o.budget = d["budget"].cast<uint64_t>();
  return o;
}

// name, begin, bytes, bytes of an element, address of its written flags or 0
using TensorRow = std::tuple<std::string, uint64_t, uint64_t, uint32_t, uint64_t>;

py::tuple launch(const Program& program, const std::string& name, std::array<uint32_t, 3> grid,
                 std::array<uint32_t, 3> block, int64_t dynamic_shared, const py::bytes& parameters,
                 const std::vector<TensorRow>& tensors, const py::dict& options, uint64_t counts) {
  Launch l;
  l.program = &program;
  l.kernel = &find_kernel(program, name);
  std::copy(grid.begin(), grid.end(), l.grid);
  std::copy(block.begin(), block.end(), l.block);
  l.dynamic_shared = dynamic_shared;
  const std::string bytes = parameters;
  l.parameters.assign(bytes.begin(), bytes.end());
  l.options = read_options(options);
  const int64_t threads = int64_t{block[0]} * block[1] * block[2];
  if (threads < 1 || threads > 1024) throw py::value_error("a CTA has 1 to 1024 threads");
  if (static_cast<int64_t>(bytes.size()) != l.kernel->parameter_bytes)
    throw py::value_error("the parameters have the wrong size");
  if (dynamic_shared < 0 || l.shared_bytes() > kMostShared) {
    throw py::value_error("more shared memory than any GPU has");
  }
  if (l.kernel->threads_required != 0 && threads != l.kernel->threads_required) {
    throw py::value_error("the kernel needs " + std::to_string(l.kernel->threads_required) +
                          " threads");
  }
  std::vector<Tensor> known;
  for (const auto& row : tensors) {
    const uint64_t begin = std::get<1>(row);
    known.push_back({std::get<0>(row), begin, begin + std::get<2>(row),
                     std::max(1u, std::get<3>(row)), reinterpret_cast<uint8_t*>(std::get<4>(row))});
  }
  for (const auto& variable : program.globals) {
    const auto begin = reinterpret_cast<uint64_t>(variable.second.data());
    known.push_back({variable.first, begin, begin + variable.second.size(), 1, nullptr});
  }
  // Compare-and-swap on 16-bit elements is done on the aligned word around them.
  l.registry.build(std::move(known), l.kernel->compares);
  prepare_global_races(&l);
  Result result;
  {
    const py::gil_scoped_release release;
    result = run_launch(l);
  }
  py::object report = py::none();
  if (result.report.failed) {
    report = describe_report(result.report);
  } else {
    add_counts(result.counts, reinterpret_cast<int64_t*>(counts));
  }
  return py::make_tuple(report, py::bytes(result.printed));
}

}  // namespace
}  // namespace emulator
}  // namespace llmkern

PYBIND11_MODULE(_C_emulator, m) {
  using namespace llmkern::emulator;
  py::register_exception<PtxError>(m, "PtxError", PyExc_ValueError);
  py::class_<Program>(m, "Program")
      .def(py::init([](const std::string& text) { return load_program(text); }))
      .def("kernels",
           [](const Program& p) {
             std::vector<std::string> names;
             for (const auto& kernel : p.kernels) names.push_back(kernel->name);
             return names;
           })
      .def("variables",
           [](const Program& p) {
             py::dict found;
             for (const auto& variable : p.globals) {
               const auto address = reinterpret_cast<uint64_t>(variable.second.data());
               found[py::str(variable.first)] = py::make_tuple(address, variable.second.size());
             }
             return found;
           })
      .def("describe", &describe_kernel)
      .def("instructions", &describe_instructions)
      .def("launch", &launch);
}
