// SPDX-License-Identifier: Apache-2.0

// Package kind is the provider of kind clusters: one cluster per mode, each with a control plane and a worker as containers of
// Docker or podman, and real pods on the worker. Modes without a proxy share a cluster, with a worker each.
package kind

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	kindcluster "sigs.k8s.io/kind/pkg/cluster"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/engine"
)

// Provider opens kind clusters.
type Provider struct{}

var _ clusters.Provider = Provider{}

func (Provider) Name() string { return "kind" }

func (Provider) Doc() string {
	return "one kind cluster per mode, with real pods; needs root and a container engine (Docker, podman, or make kind-engine)"
}

// Supports refuses the legacy backend of iptables: a node's kube-proxy uses the one that its kubelet does, which in kind's image is
// nf_tables on every kernel that has it. Clients inside the cluster are known by the ranges of pods alone.
func (Provider) Supports(spec clusters.ProxySpec) error {
	if spec.MasqueradeAll || spec.LocalMode != "" {
		return fmt.Errorf("kind's nodes masquerade what comes from outside the ranges of pods: %w", clusters.ErrNotSupported)
	}
	if spec.IPTables == "legacy" {
		return fmt.Errorf("kind's nodes use the nf_tables backend of iptables: %w", clusters.ErrNotSupported)
	}
	return nil
}

// world is what the clusters of one plan share.
type world struct {
	plan   clusters.Plan
	run    *host.Run
	engine engine.Engine
	kind   *kindcluster.Provider
	image  string // of the nodes
	// pods is the image of the pods, as this run named it, and archive the file that holds it.
	pods, archive string
	report        func(string)
}

// Create makes one cluster for each of the plan's sites, several at a time.
func (Provider) Create(ctx context.Context, plan clusters.Plan) (_ []clusters.Cluster, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("kind's nodes are entered by their processes: run it as root (sudo)")
	}
	e, err := engine.Find(ctx)
	if err != nil {
		return nil, err
	}
	if plan.Program == "" {
		if plan.Program, err = os.Executable(); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(plan.Dir, 0o755); err != nil {
		return nil, err
	}
	if plan.Dir, err = filepath.Abs(plan.Dir); err != nil {
		return nil, err
	}
	w := &world{plan: plan, engine: e, report: plan.Progress}
	if w.report == nil {
		w.report = func(string) {}
	}
	groups := w.groups()
	nodes, proxies := 0, 0
	for _, group := range groups {
		here := w.workers(len(group)) + 1
		nodes += here
		if group[0].KubeProxy != "" {
			proxies += here // on the control plane's node too
		}
	}
	if err := Enough(ctx, e, nodes, proxies); err != nil {
		return nil, err
	}
	use(e)
	if w.kind, err = newKind(e); err != nil {
		return nil, err
	}
	if w.run, err = host.New(plan.Name, plan.Dir); err != nil {
		return nil, err
	}
	made := make([]*cluster, len(groups))
	defer func() {
		if err == nil {
			return
		}
		if plan.Retain {
			err = fmt.Errorf("%w\n%s", err, w.howToEnter())
			return
		}
		for _, c := range made {
			if c != nil {
				err = errors.Join(err, c.Close(context.WithoutCancel(ctx)))
			}
		}
		err = errors.Join(err, w.close(context.WithoutCancel(ctx)))
	}()
	if err = w.makeNetwork(ctx); err != nil {
		return nil, err
	}
	if w.image, err = w.nodeImage(ctx); err != nil {
		return nil, err
	}
	if err = w.buildPodImage(ctx); err != nil {
		return nil, err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.NumCPU())
	for i, group := range groups {
		g.Go(func() error {
			c, err := w.create(gctx, w.clusterName(group), group)
			if made[i] = c; err == nil {
				// What ten nodes do of their own accord takes half of two CPUs, and the others are still to be made.
				err = c.freeze(gctx, true)
			}
			if err != nil {
				return fmt.Errorf("cluster %s: %w", c.name, err)
			}
			return nil
		})
	}
	if err = g.Wait(); err != nil {
		return nil, err
	}
	for _, c := range made {
		if err = c.freeze(ctx, false); err != nil {
			return nil, err
		}
	}
	list := make([]clusters.Cluster, len(made))
	for i, c := range made {
		list[i] = c
	}
	// The last cluster that is closed takes along what all share.
	made[len(made)-1].last = true
	return list, nil
}

// makeNetwork makes a network of the run's own for the nodes, which goes with it; kind's is for all clusters and stays. kind would make
// it too, but its clusters would get in each other's way.
func (w *world) makeNetwork(ctx context.Context) error {
	name := "plimsoll-" + w.plan.Name
	if err := w.run.Record(host.Containers{Networks: []string{name}}); err != nil {
		return err
	}
	os.Setenv("KIND_EXPERIMENTAL_DOCKER_NETWORK", name)
	os.Setenv("KIND_EXPERIMENTAL_PODMAN_NETWORK", name)
	return quiet(w.engine.Command(ctx, slices.Concat([]string{"network", "create", "--driver", "bridge"}, w.networkFlags(), []string{name})...))
}

// use makes kind, which runs the engine's command by its name, find it.
func use(e engine.Engine) {
	if e.Path != "" && !strings.HasPrefix(os.Getenv("PATH"), e.Path+":") {
		os.Setenv("PATH", e.Path+":"+os.Getenv("PATH"))
	}
}

func newKind(e engine.Engine) (*kindcluster.Provider, error) {
	switch e.Kind {
	case "docker":
		return kindcluster.NewProvider(kindcluster.ProviderWithDocker()), nil
	case "podman":
		return kindcluster.NewProvider(kindcluster.ProviderWithPodman()), nil
	}
	return nil, fmt.Errorf("kind does not know the engine %q", e.Kind)
}

// Remove deletes what a run made in the engine that answers. What is gone already is no error.
func Remove(ctx context.Context, made host.Containers) error {
	e, err := engine.Find(ctx)
	if errors.Is(err, engine.ErrNone) {
		// Containers and networks went with their engine.
		return nil
	}
	if err != nil {
		return err
	}
	use(e)
	k, err := newKind(e)
	if err != nil {
		return err
	}
	return errors.Join(settle(ctx, made), remove(ctx, e, k, made))
}

// settle waits until the engine has made what a run that was killed had asked for: what comes after everything was removed would stay.
func settle(ctx context.Context, made host.Containers) error {
	ctx, cancel := context.WithTimeout(ctx, host.SettleLimit)
	defer cancel()
	return host.Poll(ctx, "the engine to end what the run began", func() (bool, error) {
		files, err := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, f := range files {
			// A process that has ended meanwhile makes nothing.
			if line, err := os.ReadFile(f); err == nil && making(strings.Split(string(line), "\x00"), made) {
				return false, nil
			}
		}
		return err == nil, err
	})
}

// making says whether a command's words have an engine make one of those things.
func making(words []string, things host.Containers) bool {
	i := slices.IndexFunc(words, func(w string) bool { return filepath.Base(w) == "docker" || filepath.Base(w) == "podman" })
	if i < 0 || !slices.ContainsFunc(words[i:], func(w string) bool { return w == "run" || w == "build" || w == "create" }) {
		return false
	}
	for _, name := range slices.Concat(things.Clusters, things.Images, things.Networks) {
		if slices.ContainsFunc(words[i:], func(w string) bool { return strings.Contains(w, name) }) {
			return true
		}
	}
	return false
}

// deleteCluster has kind delete a cluster. kind also wants to take it out of a kubeconfig, and gets an empty one: the run's stays as
// it is, and the user's never knew it.
func deleteCluster(k *kindcluster.Provider, name string) error {
	dir, err := os.MkdirTemp("", "plimsoll-")
	if err != nil {
		return err
	}
	return errors.Join(explain(k.Delete(name, filepath.Join(dir, "kubeconfig"))), os.RemoveAll(dir))
}

func remove(ctx context.Context, e engine.Engine, k *kindcluster.Provider, made host.Containers) error {
	var errs []error
	for _, name := range made.Clusters {
		errs = append(errs, deleteCluster(k, name))
	}
	for _, name := range made.Images {
		if quiet(e.Command(ctx, "image", "inspect", name)) == nil {
			errs = append(errs, quiet(e.Command(ctx, "rmi", "--force", name)))
		}
	}
	for _, name := range made.Networks {
		if quiet(e.Command(ctx, "network", "inspect", name)) == nil {
			errs = append(errs, quiet(e.Command(ctx, "network", "rm", name)))
		}
	}
	return errors.Join(errs...)
}

// groups are the sites of each cluster: those with a proxy have one to themselves, those without share the first.
func (w *world) groups() [][]clusters.ProxySpec {
	var floors []clusters.ProxySpec
	var groups [][]clusters.ProxySpec
	for _, spec := range w.plan.Sites {
		if spec.KubeProxy == "" && !spec.Agent {
			floors = append(floors, spec)
		} else {
			groups = append(groups, []clusters.ProxySpec{spec})
		}
	}
	if len(floors) > 0 {
		groups = slices.Insert(groups, 0, floors)
	}
	return groups
}

// workers is how many a cluster of so many sites has.
func (w *world) workers(sites int) int { return max(sites, w.plan.Workers) }

// clusterName is the kind cluster of a group of sites, named for the first of them.
func (w *world) clusterName(group []clusters.ProxySpec) string {
	return "plimsoll-" + w.plan.Name + "-" + group[0].Name
}

// howToEnter says what was kept and how to look into it.
func (w *world) howToEnter() string {
	lines := []string{"kept, because --retain was given; plimsoll clean removes it:"}
	for _, group := range w.groups() {
		lines = append(lines, fmt.Sprintf("  %s exec -it %s-worker bash", filepath.Join(w.engine.Path, w.engine.Kind), w.clusterName(group)))
	}
	return strings.Join(lines, "\n")
}

// close removes all that the run made in the engine, and its hold on the host.
func (w *world) close(ctx context.Context) error {
	return errors.Join(remove(ctx, w.engine, w.kind, w.run.Recorded()), w.run.Close(ctx))
}
