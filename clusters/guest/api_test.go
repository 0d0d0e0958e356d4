// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

// mustServeAPI starts an API and returns a client of it by a kubeconfig, as a proxy has one.
func mustServeAPI(t *testing.T) (*api, kubernetes.Interface) {
	t.Helper()
	a, err := newAPI()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(context.Background()) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go a.Forward(l)
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := a.Kubeconfig(file, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		t.Fatal(err)
	}
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.AcceptContentTypes = config.ContentType
	return a, kubernetes.NewForConfigOrDie(config)
}

func service(name, address string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "plimsoll", Name: name},
		Spec:       corev1.ServiceSpec{ClusterIP: address, Ports: []corev1.ServicePort{{Port: 80}}},
	}
}

// What client-go's informers show is what was written, whenever it was.
func TestInformersFollow(t *testing.T) {
	a, client := mustServeAPI(t)
	if err := a.create(service("early", "198.19.1.1")); err != nil {
		t.Fatal(err)
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	informer := factory.Core().V1().Services().Informer()
	seen := make(chan string, 100)
	informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { seen <- "added " + o.(*corev1.Service).Name },
		UpdateFunc: func(_, o any) { seen <- "changed " + o.(*corev1.Service).Name },
		DeleteFunc: func(o any) { seen <- "deleted " + o.(*corev1.Service).Name },
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	factory.Start(ctx.Done())
	want := func(all ...string) {
		t.Helper()
		wanted := make(map[string]bool)
		for _, w := range all {
			wanted[w] = true
		}
		for len(wanted) > 0 {
			select {
			case s := <-seen:
				if !wanted[s] {
					t.Fatalf("%s, and %v is awaited", s, wanted)
				}
				delete(wanted, s)
			case <-ctx.Done():
				t.Fatalf("%v did not come", wanted)
			}
		}
	}
	want("added kubernetes", "added early")
	services := client.CoreV1().Services("plimsoll")
	made, err := services.Create(ctx, service("late", "198.19.1.2"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want("added late")
	if made.Spec.Type != corev1.ServiceTypeClusterIP || made.Spec.ClusterIPs[0] != "198.19.1.2" || made.Spec.Ports[0].Protocol != corev1.ProtocolTCP {
		t.Errorf("its defaults are missing: %+v", made.Spec)
	}
	made.Spec.Ports[0].Port = 81
	if _, err := services.Update(ctx, made, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	want("changed late")
	if err := services.Delete(ctx, "early", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	want("deleted early")
}

// Lists and watches select by namespace, labels and fields.
func TestSelections(t *testing.T) {
	a, client := mustServeAPI(t)
	for _, o := range []*corev1.Service{service("one", "198.19.1.1"), service("none", corev1.ClusterIPNone)} {
		if err := a.create(o); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		namespace string
		options   metav1.ListOptions
		want      int
	}{
		{"", metav1.ListOptions{}, 3},
		{"plimsoll", metav1.ListOptions{}, 2},
		{"plimsoll", metav1.ListOptions{FieldSelector: "spec.clusterIP!=None"}, 1},
		{"", metav1.ListOptions{FieldSelector: "metadata.name=kubernetes"}, 1},
		{"", metav1.ListOptions{LabelSelector: "!service.kubernetes.io/service-proxy-name"}, 3},
		{"", metav1.ListOptions{LabelSelector: "service.kubernetes.io/service-proxy-name"}, 0},
	} {
		list, err := client.CoreV1().Services(c.namespace).List(t.Context(), c.options)
		if err != nil {
			t.Fatal(err)
		}
		if len(list.Items) != c.want {
			t.Errorf("namespace %q, %+v: %d Services, want %d", c.namespace, c.options, len(list.Items), c.want)
		}
	}
	addresses, err := client.NetworkingV1().IPAddresses().List(t.Context(), metav1.ListOptions{})
	if err != nil || len(addresses.Items) != 2 {
		t.Errorf("%d addresses of Services, want 2: %v", len(addresses.Items), err)
	}
}

// A watch from a version at which something was deleted since is refused, and what is not there is not found.
func TestRefusals(t *testing.T) {
	a, client := mustServeAPI(t)
	services := client.CoreV1().Services("plimsoll")
	if err := a.create(service("one", "198.19.1.1")); err != nil {
		t.Fatal(err)
	}
	list, err := services.List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := services.Delete(t.Context(), "one", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := services.Watch(t.Context(), metav1.ListOptions{ResourceVersion: list.ResourceVersion}); !apierrors.IsResourceExpired(err) {
		t.Errorf("watch from before a deletion: %v", err)
	}
	if _, err := services.Get(t.Context(), "one", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("get what is deleted: %v", err)
	}
	if _, err := services.Update(t.Context(), service("one", "198.19.1.1"), metav1.UpdateOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("update what is deleted: %v", err)
	}
	if _, err := services.Create(t.Context(), service("two", "198.19.1.1"), metav1.CreateOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := services.Create(t.Context(), service("two", "198.19.1.1"), metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		t.Errorf("create what is there: %v", err)
	}
	if _, err := client.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("list what there is none of: %v", err)
	}
	w, err := client.DiscoveryV1().EndpointSlices("").Watch(t.Context(), metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	if event := <-w.ResultChan(); event.Type != watch.Added || event.Object.(*discoveryv1.EndpointSlice).Name != "kubernetes" {
		t.Errorf("want the API server's own slice, got %+v", event)
	}
}
