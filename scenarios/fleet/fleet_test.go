// SPDX-License-Identifier: Apache-2.0

package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"

	"github.com/plimsoll-bench/plimsoll/clusters/lab"
	"github.com/plimsoll-bench/plimsoll/clusters/lab/labtest"
)

// testCluster is a real etcd and kube-apiserver.
type testCluster struct {
	client kubernetes.Interface
	etcd   *clientv3.Client
	log    string // kube-apiserver's
}

func mustStart(tb testing.TB) testCluster {
	tb.Helper()
	bin := labtest.Bin(tb, "../../bin")
	dir := tb.TempDir()
	control, err := lab.StartControlPlane(tb.Context(), lab.ControlPlaneOptions{
		Name: fmt.Sprintf("test-%s-%d", strings.ToLower(strings.NewReplacer("/", "-", "=", "-").Replace(tb.Name())), os.Getpid()),
		Dir:  dir,
		Bin:  bin,
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := control.Close(ctx); err != nil {
			tb.Error(err)
		}
	})
	client, err := kubernetes.NewForConfig(control.RESTConfig())
	if err != nil {
		tb.Fatal(err)
	}
	etcd, err := control.Etcd()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { etcd.Close() })
	return testCluster{client: client, etcd: etcd, log: filepath.Join(dir, "kube-apiserver.log")}
}

func mustNew(tb testing.TB, client kubernetes.Interface, etcd *clientv3.Client, plan Plan) *Fleet {
	tb.Helper()
	f, err := New(tb.Context(), client, etcd, lab.StoragePrefix, plan)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(f.Close)
	return f
}

func mustScale(tb testing.TB, f *Fleet, n int) Timing {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 2*time.Minute)
	defer cancel()
	timing, err := f.Scale(ctx, n, nil)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Logf("%d Services: written %v, informed %v, listed %v", n,
		timing.Written.Round(time.Millisecond), timing.Informed.Round(time.Millisecond), timing.Listed.Round(time.Millisecond))
	return timing
}

// checkShown fails unless the API shows n Services, slices and IPAddresses of the namespace.
func checkShown(t *testing.T, client kubernetes.Interface, namespace string, n int) {
	t.Helper()
	for k := range kinds {
		list, err := k.list(t.Context(), client, namespace, metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var got int
		meta.EachListItem(list, func(obj runtime.Object) error {
			if _, ours := entryOf(obj, namespace); ours {
				got++
			}
			return nil
		})
		if got != n {
			t.Errorf("the API shows %d %s, want %d", got, k, n)
		}
	}
}

// checkLog fails when the API server found fault with the address of more than one in 50 of n Services. It compares what two
// watches of its own show, so on a busy machine a few are no news: those made through the API suffer the same.
func checkLog(t *testing.T, path string, n int) {
	t.Helper()
	log, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var complaints []string
	for line := range strings.Lines(string(log)) {
		for _, complaint := range []string{"IPAddress", "not allocated", "wrong reference", "leaked"} {
			if strings.HasPrefix(line, "E") && strings.Contains(line, complaint) {
				complaints = append(complaints, line)
				break
			}
		}
	}
	if len(complaints) > n/50 {
		t.Errorf("kube-apiserver complains %d times of %d Services; the first: %s", len(complaints), n, complaints[0])
	}
}

func TestScale(t *testing.T) {
	c := mustStart(t)
	f := mustNew(t, c.client, c.etcd, labPlan())
	for _, n := range []int{0, 500, 2000, 100} {
		mustScale(t, f, n)
		if f.Len() != n {
			t.Errorf("Len = %d, want %d", f.Len(), n)
		}
		checkShown(t, c.client, "fleet", n)
	}

	// What the fleet says of a Service is what the API says.
	s := f.Service(99)
	service, err := c.client.CoreV1().Services("fleet").Get(t.Context(), s.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := netip.MustParseAddrPort(fmt.Sprintf("%s:%d", service.Spec.ClusterIP, service.Spec.Ports[0].Port)); got != s.Address {
		t.Errorf("the API says %s of Service 99, the fleet %s", got, s.Address)
	}
	slice, err := c.client.DiscoveryV1().EndpointSlices("fleet").Get(t.Context(), s.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var backends []netip.AddrPort
	for _, e := range slice.Endpoints {
		backends = append(backends, netip.MustParseAddrPort(fmt.Sprintf("%s:%d", e.Addresses[0], *slice.Ports[0].Port)))
	}
	if diff := cmp.Diff(s.Backends, backends, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("backends of Service 99, fleet against API:\n%s", diff)
	}

	// A Service keeps its address when the fleet has shrunk and grown.
	mustScale(t, f, 50)
	mustScale(t, f, 100)
	if got := f.Service(99); got.Address != s.Address {
		t.Errorf("Service 99 moved from %s to %s", s.Address, got.Address)
	}
	checkLog(t, c.log, 2000)
}

// TestThroughTheAPI does with the fleet's Services what users do with theirs.
func TestThroughTheAPI(t *testing.T) {
	c := mustStart(t)
	f := mustNew(t, c.client, c.etcd, labPlan())
	mustScale(t, f, 300)
	ctx := t.Context()
	services, slices := c.client.CoreV1().Services("fleet"), c.client.DiscoveryV1().EndpointSlices("fleet")

	// Update.
	service, err := services.Get(ctx, f.Service(7).Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	service.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
	service.Annotations = map[string]string{"changed": "yes"}
	updated, err := services.Update(ctx, service, metav1.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if updated.Spec.ClusterIP != f.Service(7).Address.Addr().String() || updated.UID != service.UID {
		t.Errorf("the update changed the address or UID: %v", updated)
	}
	slice, err := slices.Get(ctx, f.Service(7).Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	slice.Endpoints = slice.Endpoints[:1]
	if _, err := slices.Update(ctx, slice, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}

	// Delete: the API server releases the address.
	gone := f.Service(8)
	if err := services.Delete(ctx, gone.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.client.NetworkingV1().IPAddresses().Get(ctx, gone.Address.Addr().String(), metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("IPAddress of a deleted Service: %v, want not found", err)
	}

	// Create: new ones get free addresses, a taken one is refused, the released one is free.
	taken := make(map[string]bool)
	for i := range f.Len() {
		taken[f.Service(i).Address.Addr().String()] = true
	}
	for i := range 20 {
		wish := newService(labPlan(), Service{Name: fmt.Sprintf("new-%d", i)})
		made, err := c.client.CoreV1().Services("default").Create(ctx, withNamespace(wish, "default"), metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if taken[made.Spec.ClusterIP] && made.Spec.ClusterIP != gone.Address.Addr().String() {
			t.Errorf("the API server gave %s away twice", made.Spec.ClusterIP)
		}
		taken[made.Spec.ClusterIP] = true
	}
	clash := withNamespace(newService(labPlan(), Service{Name: "clash", Address: f.Service(9).Address}), "default")
	if _, err := c.client.CoreV1().Services("default").Create(ctx, clash, metav1.CreateOptions{}); !apierrors.IsInvalid(err) {
		t.Errorf("a second Service at %s: error %v, want invalid", f.Service(9).Address, err)
	}
	squatter := withNamespace(newService(labPlan(), Service{Name: "squatter", Address: gone.Address}), "default")
	if _, err := c.client.CoreV1().Services("default").Create(ctx, squatter, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	// The next Scale mends the fleet, around the address that somebody else has now. Our watch has seen that when it has
	// seen the squatter's IPAddress.
	awaitForeign(t, f, gone.Address.Addr())
	mustScale(t, f, 400)
	checkShown(t, c.client, "fleet", 400)
	if got := f.Service(8); got.Address == gone.Address || got.Name != gone.Name {
		t.Errorf("Service 8 is %v again, whose address is taken", got)
	}
	checkLog(t, c.log, 400)
}

func withNamespace(s *corev1.Service, namespace string) *corev1.Service {
	s.Namespace = namespace
	return s
}

// awaitForeign returns when the fleet's watch shows that somebody else has the address.
func awaitForeign(t *testing.T, f *Fleet, addr netip.Addr) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	v := f.views[kindIPAddress]
	err := v.await(ctx, "a foreign address", func(map[string]string) bool {
		_, ok := v.others[addr.String()]
		return ok
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestStoredAsByTheAPIServer compares, byte by byte of etcd, a Service of the fleet with one that was made through the API.
func TestStoredAsByTheAPIServer(t *testing.T) {
	c := mustStart(t)
	ctx := t.Context()
	f := mustNew(t, c.client, c.etcd, labPlan())
	mustScale(t, f, 10)
	ours := f.Service(9)
	w := f.write.(*storageWriter)

	theirs := ours
	theirs.Name = "svc-by-api"
	wish := newService(labPlan(), theirs)
	wish.Spec.ClusterIP = ""
	made, err := c.client.CoreV1().Services("fleet").Create(ctx, wish, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.client.DiscoveryV1().EndpointSlices("fleet").Create(ctx, newSlice(labPlan(), theirs), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	for k, name := range [kinds][2]string{
		kindIPAddress: {ours.Address.Addr().String(), made.Spec.ClusterIP},
		kindSlice:     {ours.Name, theirs.Name},
		kindService:   {ours.Name, theirs.Name},
	} {
		t.Run(kind(k).String(), func(t *testing.T) {
			a, b := mustStored(t, w, kind(k), name[0]), mustStored(t, w, kind(k), name[1])
			if a.(metav1.Object).GetUID() == b.(metav1.Object).GetUID() {
				t.Error("two objects have one UID")
			}
			even(a)
			even(b)
			if diff := cmp.Diff(b, a); diff != "" {
				t.Errorf("-as the API server stores it +as the fleet does:\n%s", diff)
			}
			var x, y bytes.Buffer
			if err := errors.Join(w.codec.Encode(a, &x), w.codec.Encode(b, &y)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(x.Bytes(), y.Bytes()) {
				t.Error("alike, but not byte by byte")
			}
		})
	}
}

func mustStored(t *testing.T, w *storageWriter, k kind, name string) runtime.Object {
	t.Helper()
	got, err := w.etcd.Get(t.Context(), w.key(k, name))
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Kvs) != 1 {
		t.Fatalf("etcd holds %d objects at %s, want 1", len(got.Kvs), w.key(k, name))
	}
	obj, _, err := w.codec.Decode(got.Kvs[0].Value, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return obj
}

// even takes away what differs between any two objects: name, UID, times, address.
func even(obj runtime.Object) {
	m := obj.(metav1.Object)
	m.SetName("")
	m.SetUID("")
	m.SetCreationTimestamp(metav1.Time{})
	fields := m.GetManagedFields()
	for i := range fields {
		fields[i].Time = nil
	}
	m.SetManagedFields(fields)
	switch o := obj.(type) {
	case *corev1.Service:
		o.Spec.ClusterIP, o.Spec.ClusterIPs = "", []string{""}
	case *discoveryv1.EndpointSlice:
		o.Labels[discoveryv1.LabelServiceName] = ""
	case *networkingv1.IPAddress:
		o.Spec.ParentRef.Name = ""
	}
}

// TestSetEndpoints changes a slice in both ways: watches show the change, and storage holds the same bytes after both.
func TestSetEndpoints(t *testing.T) {
	c := mustStart(t)
	ctx := t.Context()
	want := []netip.Addr{netip.MustParseAddr("198.18.7.1"), netip.MustParseAddr("198.18.7.2"), netip.MustParseAddr("198.18.7.3")}
	var storage storageWriter // reads what either has written
	var stored [2]runtime.Object
	for n, etcd := range []*clientv3.Client{c.etcd, nil} {
		plan := labPlan()
		plan.Namespace = [2]string{"stored", "by-api"}[n]
		f := mustNew(t, c.client, etcd, plan)
		mustScale(t, f, 2)
		name := f.Service(1).Name
		before, err := c.client.DiscoveryV1().EndpointSlices(plan.Namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		limit, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		watch, err := c.client.DiscoveryV1().EndpointSlices(plan.Namespace).Watch(limit, metav1.ListOptions{ResourceVersion: before.ResourceVersion, FieldSelector: "metadata.name=" + name})
		if err != nil {
			t.Fatal(err)
		}
		defer watch.Stop()
		if err := f.SetEndpoints(ctx, 1, want...); err != nil {
			t.Fatal(err)
		}
		event, ok := <-watch.ResultChan()
		if !ok {
			t.Fatal("the watch has not shown the change within ten seconds")
		}
		slice, ok := event.Object.(*discoveryv1.EndpointSlice)
		if !ok || event.Type != "MODIFIED" || slice.UID != before.UID || slice.Generation != before.Generation+1 {
			t.Fatalf("of slice %s, generation %d, the watch shows %s %v", before.UID, before.Generation, event.Type, event.Object)
		}
		var got []netip.Addr
		for _, e := range slice.Endpoints {
			got = append(got, netip.MustParseAddr(e.Addresses[0]))
		}
		if !slices.Equal(got, want) {
			t.Errorf("the watch shows %v, want %v", got, want)
		}
		if etcd != nil {
			storage = *f.write.(*storageWriter)
		}
		storage.namespace = plan.Namespace
		stored[n] = mustStored(t, &storage, kindSlice, name)
		even(stored[n])
		stored[n].(metav1.Object).SetNamespace("")
	}
	if diff := cmp.Diff(stored[1], stored[0]); diff != "" {
		t.Errorf("-as the API server stores it +as the fleet does:\n%s", diff)
	}
}

// TestAPIOnly is the fleet of a provider that gives no way to its storage.
func TestAPIOnly(t *testing.T) {
	c := mustStart(t)
	plan := labPlan()
	plan.Namespace = "small"
	f := mustNew(t, c.client, nil, plan)
	var last, total int
	for _, n := range []int{150, 40} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := f.Scale(ctx, n, func(d, of int) { last, total = d, of }); err != nil {
			t.Fatal(err)
		}
		checkShown(t, c.client, "small", n)
		if last != total || total == 0 {
			t.Errorf("progress ended at %d of %d", last, total)
		}
	}

	// One seed, one fleet, however it is written.
	plan.Namespace = "stored"
	for i := range 40 {
		if err := c.client.CoreV1().Services("small").Delete(t.Context(), f.Service(i).Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	g := mustNew(t, c.client, c.etcd, plan)
	mustScale(t, g, 40)
	for i := range 40 {
		if a, b := f.Service(i), g.Service(i); a.Address != b.Address {
			t.Errorf("Service %d of one seed is at %s and at %s", i, a.Address, b.Address)
		}
	}
}

func TestRefusals(t *testing.T) {
	c := mustStart(t)
	plan := labPlan()
	plan.Namespace = "default"
	if _, err := New(t.Context(), c.client, c.etcd, lab.StoragePrefix, plan); err == nil || !strings.Contains(err.Error(), "kubernetes") {
		t.Errorf("error in a namespace with a Service of its own = %v, want that Service's name", err)
	}
	if _, err := New(t.Context(), c.client, c.etcd, "/elsewhere", labPlan()); err == nil || !strings.Contains(err.Error(), "/elsewhere") {
		t.Errorf("error with a wrong prefix = %v, want the prefix", err)
	}
	f := mustNew(t, c.client, c.etcd, labPlan())
	if _, err := f.Scale(t.Context(), 65280, nil); err == nil || !strings.Contains(err.Error(), "room for") {
		t.Errorf("error of too big a fleet = %v, want how many there is room for", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("Ctrl-C"))
	if _, err := f.Scale(ctx, 10, nil); err == nil {
		t.Error("Scale of a cancelled run succeeded")
	}
	mustScale(t, f, 10)
}

// BenchmarkScale grows a fleet from nothing:
//
//	go test -run '^$' -bench Scale -benchtime 1x ./scenarios/fleet
func BenchmarkScale(b *testing.B) {
	for _, n := range []int{2000, 20000, 50000} {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				c := mustStart(b)
				f := mustNew(b, c.client, c.etcd, labPlan())
				b.StartTimer()
				t := mustScale(b, f, n)
				b.ReportMetric(t.Written.Seconds(), "written-sec")
				b.ReportMetric(t.Informed.Seconds(), "informed-sec")
				b.ReportMetric(t.Listed.Seconds(), "listed-sec")
			}
		})
	}
}
